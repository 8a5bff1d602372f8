"""How long a test waits for what must come: a guard against hanging, never a measure of speed.

What takes a second on an idle machine takes ten beside fifteen busy processes; several ranks start in a minute there.
"""

PATIENCE_S = 1500.0
"""Seconds for anything that is waited for: below the time-out of a test (pyproject.toml), so that the wait ends with
its own message."""

HANG_S = 120.0
"""A limit that runs out, because something hangs on purpose, and under which honest work is done before: ten times what
ranks are apart on an idle machine while one of them looks for its inputs, renders a world or evaluates two videos."""

READ_CPU_S = 100.0
"""Seconds of computing after which a damaged file counts as one that hangs its reader: ten times what the slowest
costs, imports included."""

LONG_S = 7200.0
"""The time-out of a test that computes for minutes, a whole demo: ten times what that takes on two slow cores."""
