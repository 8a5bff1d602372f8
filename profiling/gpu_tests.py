"""The tests that need a GPU, on a machine that may lack much: shared out over processes, a row for whatever is wrong.

    python profiling/gpu_tests.py --out FILE.jsonl [--workers N] [--until TIME] [--marker gpu|multigpu] [PATH ...]

Needs torch, Triton and pytest. A test file that imports a package which is not installed is a "not run" row naming it;
a test that fails, or that its process died of, is a "failed" row with its error; one that does not fit or does not end
by `--until` is "not run". The last row counts the tests that passed. Exit code: 0, or 1 if something failed. Workers
exist for the compilations, which take most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "profiling/ops"))  # scripts of one checkout, not a package

from deadline import Deadline  # noqa: E402

BROKEN = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
LATE = "the run was out of time"
LONG_S = 60.0
"""A test with a time limit of its own is a long one: it is not started with less."""
Row = dict[str, Any]


class Recorder:
    """A pytest plugin: keeps one share of the tests and writes what becomes of them, a line each.

    Args:
        path: lines are appended, also by other shares.
        share, of: which tests are kept: every `of`-th from `share`.
        marker: only tests that carry it.
        deadline: no test starts after it, no long one in the minute before it.
    """

    def __init__(self, path: Path, share: int, of: int, marker: str, deadline: Deadline) -> None:
        self.path, self.share, self.of, self.marker, self.deadline = path, share, of, marker, deadline
        self.counts: Counter[str] = Counter()

    def write(self, kind: str, name: str, **more: Any) -> None:
        """Appends a line; a short one is written whole."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "name": name, **more}) + "\n")

    def progress(self, name: str, what: str) -> None:
        """Says how far a test of this share is: planned, started or passed."""
        self.write("progress", name, what=what, share=self.share)

    def row(self, name: str, status: str, note: str) -> None:
        """Appends a row of the result file."""
        self.counts[status] += 1
        self.write("test", name, status=status, note=note)

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
        """Keep this share, and say what is in it."""
        marked = [item for item in items if item.get_closest_marker(self.marker)]
        items[:] = marked[self.share :: self.of]
        for item in items:
            self.progress(item.nodeid, "planned")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Start nothing after the deadline."""
        if self.deadline.late(LONG_S if item.get_closest_marker("timeout") else 0.0):
            self.row(item.nodeid, "not run", LATE)
            return True
        self.progress(item.nodeid, "started")
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row per test that failed or was skipped."""
        if report.failed:
            self.row(report.nodeid, "failed", _last_line(str(report.longrepr)))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.row(report.nodeid, "not run", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.progress(report.nodeid, "passed")


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
    recorder = Recorder(options.out, share, of, options.marker, Deadline(options.until - options.grace_s))
    paths = [str(path) for path in options.paths or files(options.marker)]
    # A file that cannot be imported must not stop the others; no cache: the shares would write it at once.
    arguments = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]
    code = pytest.main(arguments, plugins=[recorder])
    if code in BROKEN:
        recorder.row(f"share {options.share}", "failed", f"pytest itself ended with {pytest.ExitCode(code).name}")
    return 1 if recorder.counts["failed"] else 0


def run_all(options: argparse.Namespace) -> int:
    """All shares, each in a process, and the row that counts what passed."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("")
    workers: list[subprocess.Popen[bytes]] = []
    codes: list[int | None] = [None] * options.workers
    try:
        for share in range(options.workers):
            command = [
                sys.executable, __file__, "--out", str(options.out), "--share", f"{share}/{options.workers}", "--until",
                str(options.until), "--grace-s", str(options.grace_s), "--marker", options.marker,
                *map(str, options.paths),
            ]  # fmt: skip
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True))
        for share, worker in enumerate(workers):
            codes[share] = _code_of(worker, Deadline(options.until))
    finally:  # also where this process is told to end
        end_groups(workers)
        kept = outcome(read_rows(options.out), codes)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for row in kept:
        print(f"{row['status']:8s} {row['name']}: {row['note']}", flush=True)
    return 1 if any(row["status"] == "failed" for row in kept) else 0


def _code_of(worker: subprocess.Popen[bytes], deadline: Deadline) -> int | None:
    """Exit code of a share, or None if it is not done by the deadline."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(None if deadline.until == math.inf else max(0.0, deadline.left_s))
    return None


def outcome(lines: list[Row], codes: list[int | None]) -> list[Row]:
    """The rows of the result file, from what the shares wrote and the exit codes of their processes; None: too late."""
    kept = [line for line in lines if line["kind"] == "test"]
    known = {row["name"] for row in kept}
    told = [line for line in lines if line["kind"] == "progress"]
    passed = {line["name"] for line in told if line["what"] == "passed"} - known
    started = {line["name"] for line in told if line["what"] == "started"}
    for line in told:
        if line["what"] != "planned" or line["name"] in passed | known:
            continue
        code, status, note = codes[line["share"]], "not run", LATE
        if code is not None:
            note = "its process ended in another test"
            if line["name"] in started:
                status, note = "failed", f"its process ended with {code}"
        kept.append({"kind": "test", "name": line["name"], "status": status, "note": note})
    for share, code in enumerate(codes):
        if code in (0, 1) or any(line["share"] == share for line in told):
            continue
        status, note = ("not run", LATE) if code is None else ("failed", f"it ended with {code} before it had tests")
        kept.append({"kind": "test", "name": f"share {share}", "status": status, "note": note})
    kept.append({"kind": "test", "name": "passed", "status": "ok", "note": f"{len(passed)} tests passed"})
    return kept


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may have been cut off in the middle of a line, or not begun."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def end_groups(leaders: Iterable[subprocess.Popen[bytes]], patience_s: float = 2.0) -> None:
    """Ends processes that lead a group, and all that they started.

    They are asked first: torchrun's ranks are in groups of their own, and it ends them when it is asked.
    """
    leaders = list(leaders)
    for how in (signal.SIGTERM, signal.SIGKILL):
        for leader in leaders:
            _signal_group(leader, how)
        ends = time.monotonic() + (patience_s if how == signal.SIGTERM else 1.0)
        while leaders and time.monotonic() < ends:
            leaders = [leader for leader in leaders if _signal_group(leader, 0)]
            time.sleep(0.02)


def _signal_group(leader: subprocess.Popen[bytes], how: int) -> bool:
    """Sends a signal to a group; whether anybody is left in it."""
    leader.poll()
    try:
        os.killpg(leader.pid, how)
    except ProcessLookupError:
        return False
    return True


def environment() -> dict[str, str]:
    """That of this process, with the packages of this checkout first."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def leave_when_told() -> None:
    """SIGTERM ends this process the way an exception does, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--until", type=float, default=math.inf, help="the time (date +%%s) at which all is ended")
    parser.add_argument("--grace-s", type=float, default=15.0, help="no test starts so shortly before it")
    parser.add_argument("--marker", choices=("gpu", "multigpu"), default="gpu")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help="test files (default: all that carry the marker)")
    options = parser.parse_args()
    if options.share:
        return run_share(options)
    leave_when_told()
    return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
