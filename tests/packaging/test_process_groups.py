"""No test starts a group of processes but by the fixture that counts them (``tests/integration/conftest.py``)."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
STARTS = re.compile(
    r"torch\.distributed\.run\b|\bmp\.spawn\(|torch\.multiprocessing|\binit_process_group\(|bin/torchrun"
)


def test_groups_of_processes_are_started_in_one_place() -> None:
    files = (path for path in TESTS.rglob("*.py") if path != Path(__file__))
    found = {str(path.relative_to(TESTS)) for path in files if STARTS.search(path.read_text(encoding="utf-8"))}
    assert found == {"integration/conftest.py"}


def test_how_many_groups_a_suite_may_start_is_said_once() -> None:
    """CONTRIBUTING names the constant: the number itself would be another when the next group is added."""
    said = re.findall(r"(\S+) groups of processes", (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert said == ["MOST_GROUPS"]
    assert re.search(r"^MOST_GROUPS = \d+$", (TESTS / "conftest.py").read_text(encoding="utf-8"), re.MULTILINE)
