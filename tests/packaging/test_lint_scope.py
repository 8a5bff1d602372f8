"""What the linters see: a folder that slips out of their list rots unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lines(*command: str) -> set[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_ruff_sees_every_tracked_python_file() -> None:
    """``extend-exclude`` matches names at any depth: "data" once hid ``geoalign/data`` and its tests."""
    tracked = {str(ROOT / name) for name in lines("git", "ls-files", "*.py") if (ROOT / name).exists()}
    assert tracked
    assert tracked <= lines(sys.executable, "-m", "ruff", "check", "--show-files", ".")
