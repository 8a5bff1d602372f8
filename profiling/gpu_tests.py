"""The tests that need a GPU, on a machine that may lack much: shared out over processes, a row for whatever is wrong.

    python profiling/gpu_tests.py --out FILE.jsonl [--workers N] [--budget-s S] [--marker gpu|multigpu] [PATH ...]

Needs torch, Triton and pytest. A test file that imports a package which is not installed is a "not run" row naming it;
a test that fails is a "failed" row with its error; one that does not fit into the budget is "not run". The last row
counts the tests that passed. Exit code: 0, or 1 if something failed. Workers exist for the compilations, which take
most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BROKEN = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)


class Recorder:
    """A pytest plugin: keeps one share of the tests and writes a line for each that is not simply passed.

    Args:
        path: lines are appended, also by other shares.
        share, of: which tests are kept: every `of`-th from `share`.
        marker: only tests that carry it.
        budget_s: no test starts after so many seconds.
    """

    def __init__(
        self, path: Path, share: int, of: int, marker: str, budget_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.share, self.of, self.marker, self.clock = path, share, of, marker, clock
        self.ends = clock() + budget_s
        self.counts: Counter[str] = Counter()

    def row(self, name: str, status: str, note: str) -> None:
        """Appends a line; a short one is written whole."""
        self.counts[status] += 1
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": "test", "name": name, "status": status, "note": note}) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported; the first share alone says so."""
        if report.failed and self.share == 0:
            missing = re.findall(r"No module named '([\w.]+)'", str(report.longrepr))
            ours = missing and (missing[-1].startswith("geoalign") or (ROOT / "tests/support" / missing[-1]).exists())
            if missing and not ours:
                self.row(report.nodeid, "not run", f"the package '{missing[-1]}' is not installed")
            else:
                self.row(report.nodeid, "failed", _last_line(str(report.longrepr)))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep this share."""
        marked = [item for item in items if item.get_closest_marker(self.marker)]
        items[:] = marked[self.share :: self.of]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Start nothing after the budget."""
        if self.clock() < self.ends:
            return None
        self.row(item.nodeid, "not run", "the run was out of time")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row per test that failed or was skipped."""
        if report.failed:
            self.row(report.nodeid, "failed", _last_line(str(report.longrepr)))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.row(report.nodeid, "not run", reason)
        elif report.when == "call":
            self.counts["ok"] += 1


def _last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (errors or text.strip().splitlines() or [""])[0][:500]


def files(marker: str) -> Iterator[Path]:
    """Test files that mention a marker, but those of the interpreter, which have processes of their own."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "interpreted" not in path.parts and f"mark.{marker}" in path.read_text():
            yield path


def run_share(options: argparse.Namespace) -> int:
    """One share in this process."""
    share, of = (int(part) for part in options.share.split("/"))
    recorder = Recorder(options.out, share, of, options.marker, options.budget_s)
    paths = [str(path) for path in options.paths or files(options.marker)]
    # A file that cannot be imported must not stop the others; no cache: the shares would write it at once.
    arguments = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]
    code = pytest.main(arguments, plugins=[recorder])
    if code in BROKEN:
        recorder.row(f"share {options.share}", "failed", f"pytest itself ended with {pytest.ExitCode(code).name}")
    with options.out.open("a") as file:
        file.write(json.dumps({"kind": "share", "passed": recorder.counts["ok"]}) + "\n")
    return 1 if recorder.counts["failed"] else 0


def run_all(options: argparse.Namespace) -> int:
    """All shares, each in a process, and the row that counts what passed."""
    began = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("")
    workers = []
    for share in range(options.workers):
        command = [
            sys.executable, __file__, "--out", str(options.out), "--share", f"{share}/{options.workers}",
            "--budget-s", str(options.budget_s), "--marker", options.marker, *map(str, options.paths),
        ]  # fmt: skip
        workers.append(subprocess.Popen(command, cwd=ROOT, env=environment()))
    for share, worker in enumerate(workers):
        try:
            worker.wait(max(1.0, options.budget_s + options.grace_s - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            print(f"share {share} was ended after its budget", file=sys.stderr)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    passed = sum(row.pop("passed") for row in rows if row["kind"] == "share")
    died = options.workers - sum(row["kind"] == "share" for row in rows)
    kept: list[dict[str, Any]] = [row for row in rows if row["kind"] == "test"]
    if died:
        note = f"{died} of {options.workers} processes ended early: their other tests did not run"
        kept.append({"kind": "test", "name": "processes", "status": "failed", "note": note})
    kept.append({"kind": "test", "name": "passed", "status": "ok", "note": f"{passed} tests passed"})
    options.out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for row in kept:
        print(f"{row['status']:8s} {row['name']}: {row['note']}", flush=True)
    return 1 if any(row["status"] == "failed" for row in kept) else 0


def environment() -> dict[str, str]:
    """That of this process, with the packages of this checkout first."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument(
        "--grace-s",
        type=float,
        default=15.0,
        help="a test that runs so long beyond the budget is ended",
    )
    parser.add_argument("--marker", choices=("gpu", "multigpu"), default="gpu")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help="test files (default: all that carry the marker)")
    options = parser.parse_args()
    return run_share(options) if options.share else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
