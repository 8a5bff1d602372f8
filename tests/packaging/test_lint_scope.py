"""What no linter says: a folder that slips out of their list rots unseen, and a file grows until nobody reads it."""

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


LONGEST = 600
"""Lines of a file, the bound of CONTRIBUTING.md; 400 is where one looks for a seam."""


def test_no_file_of_code_is_too_long_to_read() -> None:
    code = ("*.py", "*.js", "*.css", "*.sh", "*.cpp", "*.cu", "*.cuh", "*.h")
    paths = [path for name in lines("git", "ls-files", *code) if (path := ROOT / name).exists()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    assert f"more than {LONGEST} fails a test" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
