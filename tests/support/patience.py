"""How long a test waits for what must come: a guard against hanging, never a measure of speed."""

PATIENCE_S = 1500.0
"""Seconds; below the time-out of a test (pyproject.toml), so that the wait ends with its own message.

What takes a second on an idle machine takes ten beside fifteen busy processes; several ranks start in a minute there.
"""
