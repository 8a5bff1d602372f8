"""`make gpu`: a bare machine, failures that cost one row each, a budget that is kept, a file that is cut short."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from profiling_runs import ROOT, rows_of, script

HIDING = """
import os, sys
HIDDEN = os.environ["HIDE_MODULES"].split(",")
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
BARE = ("pydantic,pydantic_core,yaml,av,diffusers,transformers,nvtx,roma,deepspeed,torchao,nvidia,scipy,PIL,cv2,"
        "matplotlib,tensorboard,hypothesis,xdist,pytest_timeout")  # fmt: skip
"""What a rented machine with torch, Triton and pytest lacks."""


class Machine:
    """Stands for processes and time: every stage takes the seconds and leaves the rows that it is told to."""

    def __init__(
        self, seconds: dict[str, float], codes: dict[str, int] | None = None, steady: dict[str, Any] | None = None
    ) -> None:
        self.now, self.seconds, self.codes, self.steady = 100.0, seconds, codes or {}, steady or {}
        self.started: list[tuple[str, float]] = []

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], limit_s: float) -> int | None:
        out = Path(command[command.index("--out") + 1])
        name = out.stem
        self.started.append((name, limit_s))
        code = self.codes.get(name, 0)
        rows = [
            {
                "kind": "environment",
                "device": "X",
                "versions": {"torch": "1"},
                "steady": self.steady.get(name, True),
                "clocks_after": {"clocks.sm": name},
            },
            {"kind": "kernel", "name": name, "status": "failed" if code == 1 else "ok", "note": "boom"},
        ]
        out.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "ker')  # killed while it wrote
        took = self.seconds.get(name, 10.0)
        self.now += min(took, limit_s)
        return None if took > limit_s else code


def session_of(gpu: Any, tmp_path: Path, machine: Machine, budget_s: float, missing: tuple[str, ...] = ()) -> Any:
    from deadline import Deadline

    first = {"kind": "environment", "run_id": "r", "command": "gpu.py", "device": "X", "commit": "c", "steady": None}
    return gpu.Session(
        tmp_path / "all.jsonl", Deadline(machine.now + budget_s, machine.clock), first, start=machine.start,
        importable=lambda module: module not in missing,
    )  # fmt: skip


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize("budget_s", [60.0, 200.0, 540.0, 900.0])
@pytest.mark.parametrize("slow", [0.1, 1.0, 100.0])
def test_the_budget_is_kept_however_slow_the_stages_are(tmp_path: Path, budget_s: float, slow: float) -> None:
    import gpu

    machine = Machine(dict.fromkeys(("tests", "attention", "prologue-and-epilogue", "iteration"), 60.0 * slow))
    session = session_of(gpu, tmp_path, machine, budget_s)
    assert session.run(gpu.STAGES) == 0  # being out of time is no failure
    assert machine.now - 100.0 <= budget_s
    assert machine.started[0][0] == "tests" and all(limit >= 20 for _, limit in machine.started)
    rows = rows_of(tmp_path / "all.jsonl")
    assert rows[0]["steady"] is True and rows[0]["command"] == "gpu.py" and rows[0]["versions"] == {"torch": "1"}
    stages = [row for row in rows if row["kind"] == "stage"]
    assert [row["name"] for row in stages] == [stage.name for stage in gpu.STAGES]
    if budget_s >= 540 and slow <= 1:
        assert all(row["status"] == "ok" for row in stages)
    if budget_s == 60 and slow > 1:
        assert "out of time" in stages[-2]["note"]
    if slow == 100.0:
        assert "ended by the budget" in stages[0]["note"]


@pytest.mark.usefixtures("profiling")
def test_a_failing_stage_costs_its_own_rows_and_a_missing_package_its_stage(tmp_path: Path) -> None:
    import gpu

    machine = Machine({}, {"attention": 1, "rewards": -11})
    session = session_of(gpu, tmp_path, machine, 540.0, missing=("diffusers",))
    assert session.run(gpu.STAGES) == 1
    rows = rows_of(tmp_path / "all.jsonl")
    stages = {row["name"]: row for row in rows if row["kind"] == "stage"}
    assert [name for name, row in stages.items() if row["status"] == "failed"] == ["attention", "rewards"]
    assert stages["iteration"]["status"] == "not run" and "diffusers" in stages["iteration"]["note"]
    assert "exit code -11" in stages["rewards"]["note"]
    kernels = [row for row in rows if row["kind"] == "kernel"]
    assert [row["stage"] for row in kernels if row["status"] == "failed"] == ["attention"]
    assert len(kernels) == 5 == len(machine.started)


@pytest.mark.usefixtures("profiling")
def test_a_stage_that_cannot_run_gives_its_time_to_the_others(tmp_path: Path) -> None:
    """The machine that lacks pydantic: 540 seconds for shares of 406, whatever the stages then leave over."""
    import gpu

    machine = Machine(dict.fromkeys(("tests", "attention"), 1000.0))
    session = session_of(gpu, tmp_path, machine, 540.0, missing=("pydantic",))
    assert session.run(gpu.STAGES) == 0
    assert rows_of(tmp_path / "all.jsonl")[1]["name"] == "iteration"  # said before anything is started
    (tests, first), (attention, second) = machine.started[:2]
    assert (tests, attention) == ("tests", "attention")
    assert first == pytest.approx(115 * 540 / 406) and second == pytest.approx(95 * 540 / 406)


@pytest.mark.usefixtures("profiling")
def test_every_stage_answers_for_its_own_ceilings(tmp_path: Path) -> None:
    """One that is cut short takes nothing from the others; one whose ceiling moved makes the run unsteady, too."""
    import figures
    import gpu

    for moved, whole in ((None, True), (False, False)):
        machine = Machine({}, steady={"rewards": moved})
        session_of(gpu, tmp_path, machine, 540.0).run(gpu.STAGES)
        rows = rows_of(tmp_path / "all.jsonl")
        assert rows[0]["steady"] is whole and rows[0]["clocks_after"] == {"clocks.sm": "sampler-step-and-feed-forward"}
        kernels = {row["name"]: row for row in rows if row["kind"] == "kernel"}
        assert [name for name, row in kernels.items() if row["steady"] is not True] == ["rewards"]
        stages = {row["name"]: row for row in rows if row["kind"] == "stage"}
        assert stages["attention"]["steady"] is True and stages["rewards"]["steady"] is moved
        assert stages["attention"]["clocks_after"] == {"clocks.sm": "attention"}
        assert figures.unsteady(rows)[0].startswith("\n**Unsteady: rewards (")
        assert [name for name, row in kernels.items() if not figures.quotable(row, rows[0])] == ["rewards"]


NESTED = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(child.pid))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(3600)
"""
RUNNING = """
import signal, sys
sys.path[:0] = sys.argv[1:3]
import gpu, gpu_tests
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
gpu_tests.leave_when_told()
gpu.run_process([sys.executable, "-c", sys.argv[3], sys.argv[4]], 3600)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def is_gone(process: int) -> bool:
    """Ended, if perhaps not yet waited for by whoever inherits it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.usefixtures("profiling")
def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    import gpu

    assert gpu.run_process([sys.executable, "-c", "raise SystemExit(3)"], PATIENCE_S) == 3
    assert gpu.run_process([sys.executable, "-c", "import time; time.sleep(3600)"], 0.2) is None
    for how in (signal.SIGINT, signal.SIGTERM):  # ^C, an outer time limit
        told = tmp_path / how.name
        folders = [str(ROOT / part) for part in ("profiling", "profiling/ops")]
        running = subprocess.Popen([sys.executable, "-c", RUNNING, *folders, NESTED, str(told)])
        wait_until(told.exists)
        running.send_signal(how)
        assert running.wait(PATIENCE_S) != 0
        wait_until(functools.partial(is_gone, int(told.read_text())))


@pytest.mark.usefixtures("profiling")
def test_a_test_that_does_not_end_is_named_and_no_failure(tmp_path: Path) -> None:
    import gpu_tests
    from deadline import Deadline

    def told(what: str, name: str, share: int = 0) -> dict[str, Any]:
        return {"kind": "progress", "what": what, "name": name, "share": share}

    planned = [told("planned", "a"), told("planned", "b"), told("planned", "c", 1)]
    lines = [*planned, told("started", "a"), told("passed", "a"), told("started", "b")]
    late = gpu_tests.outcome(lines, [None, None])
    assert [(row["name"], row["status"]) for row in late] == [("b", "not run"), ("c", "not run"), ("passed", "ok")]
    assert late[0]["note"] == gpu_tests.LATE and late[-1]["note"] == "1 tests passed"
    # a process that dies takes the test in which it died with it, and what it had not begun is not run
    died = {row["name"]: row for row in gpu_tests.outcome([*lines, told("planned", "d")], [-11, 0])}
    assert died["b"]["status"] == "failed" and "-11" in died["b"]["note"] and died["d"]["status"] == "not run"
    before = {row["name"]: row["status"] for row in gpu_tests.outcome(planned[:2], [0, -9])}
    assert before["share 1"] == "failed"
    (tmp_path / "cut.jsonl").write_text('{"kind": "progress", "name": "a"}\n{"kind": "pro')
    assert len(gpu_tests.read_rows(tmp_path / "cut.jsonl")) == 1

    # a long test is not started in the last minute
    class Item:
        def __init__(self, *markers: str) -> None:
            self.nodeid, self.markers = "/".join(("test", *markers)), markers

        def get_closest_marker(self, name: str) -> bool:
            return name in self.markers

    recorder = gpu_tests.Recorder(tmp_path / "r.jsonl", 0, 1, "gpu", Deadline(100.0, lambda: 50.0))
    started = [recorder.pytest_runtest_protocol(item) for item in (Item(), Item("timeout"))]  # type: ignore[arg-type]
    assert started == [None, True]
    assert [row["kind"] for row in rows_of(tmp_path / "r.jsonl")] == ["progress", "test"]


def test_multigpu_has_a_row_for_every_engine(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("--out", str(out), "--workers", "1", "--marker", "multigpu", "tests/integration/test_distributed.py")
    done = script("profiling/gpu_tests.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"].partition("[")[2].rstrip("]"): row for row in rows_of(out)[:-1]}
    assert {"ddp", "deepspeed 1", "fsdp", "ulysses", "paper fsdp compiled"} <= rows.keys() and len(rows) == 12
    assert all(row["status"] == "not run" for row in rows.values())


def test_a_bare_machine_collects_what_it_can_and_lists_the_rest(tmp_path: Path) -> None:
    """Packages hidden by an import hook, no CUDA: the tests are found and skipped, files that need more are named."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = ":".join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    environment = {"HIDE_MODULES": BARE, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = tmp_path / "all.jsonl"
    done = script("profiling/gpu.py", "--self-check", "--only", "tests,iteration", "--out", str(out), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, *rows = rows_of(out)
    assert first["kind"] == "environment"
    tests = [row for row in rows if row["kind"] == "test"]
    needs_gpu = {row["name"] for row in tests if "CUDA device" in row["note"]}
    assert len(needs_gpu) > 90 and not any(row["status"] == "failed" for row in tests)
    named = {row["name"]: row["note"] for row in tests if "is not installed" in row["note"]}
    assert named["tests/integration/test_training_gpu.py"] == "the package 'pydantic' is not installed"
    (iteration,) = [row for row in rows if row["kind"] == "stage" and row["name"] == "iteration"]
    assert iteration["status"] == "not run" and "pydantic" in iteration["note"]
    report = script("profiling/figures.py", str(out))
    assert report.returncode == 0 and "no roofline" in report.stdout
    assert "pydantic" in out.with_suffix(".md").read_text()


def test_tests_that_fail_or_do_not_fit_are_a_row_each(tmp_path: Path) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "@pytest.fixture(autouse=True)\ndef there(): pass\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_good_again(): pass\n"
    )
    broken = tmp_path / "test_broken.py"
    broken.write_text("import geoalign_kernels.nonsense\n")
    conftest = tmp_path / "pytest.ini"
    conftest.write_text("[pytest]\nmarkers = gpu\n")

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / "out.jsonl"
        done = script("profiling/gpu_tests.py", "--out", str(out), "--workers", "2", *arguments, str(file), str(broken))
        return done.returncode, rows_of(out)

    code, rows = run()
    assert code == 1 and rows[-1]["note"] == "2 tests passed"
    failed = {row["name"].rpartition("::")[2] or row["name"]: row["note"] for row in rows if row["status"] == "failed"}
    assert "one is not two" in failed["test_bad"] and len(failed) == 2
    assert any("nonsense" in note for note in failed.values())  # a module of ours that is missing is a failure
    # Workers import and collect, however slow the machine, and have nothing left to start a test with.
    code, rows = run("--until", str(time.time() + PATIENCE_S), "--grace-s", str(2 * PATIENCE_S))
    late = [row for row in rows if row["note"] == "the run was out of time"]
    assert len(late) == 3 and rows[-1]["note"] == "0 tests passed"


@pytest.mark.usefixtures("profiling")
def test_a_row_that_fails_or_does_not_fit_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_attention
    import bench_ops
    import torch
    from deadline import Deadline

    now = [0.0]
    deadline = Deadline(100.0, lambda: now[0])
    bench = bench_ops.Bench(torch.device("cpu"), tmp_path / "r.jsonl", quick=True, small=True, deadline=deadline)
    forward = bench_attention.forward

    def broken(name: str, *operands: torch.Tensor) -> torch.Tensor:
        if name == "int8":
            raise RuntimeError("injected\nsecond line")
        if name == "int8_fp8" and operands[0].shape != operands[1].shape:
            now[0] = 101.0
        return forward(name, *operands)

    monkeypatch.setattr(bench_attention, "forward", broken)
    bench.cases(bench_attention.attention_cases([(40, 40), (40, 24)], 2, 16, bench.device, bench.dtype))
    rows = rows_of(tmp_path / "r.jsonl")[1:]
    of = {(row["name"], row["impl"], row["direction"]): row for row in rows}
    assert of["attention", "int8", "fwd"]["status"] == "failed"
    assert of["attention", "int8", "fwd"]["note"] == "RuntimeError: injected"
    assert of["attention", "int8_fp8", "fwd"]["status"] == "ok" == of["cross_attention", "sdpa_flash", "fwd"]["status"]
    assert "out of time" in of["attention", "sdpa_flash", "bwd"]["note"]  # after all forwards that a run is there for
    assert "out of time" in of["attention", "reference", "fwd"]["note"]
    assert sum(row["status"] == "failed" for row in rows) == 2  # both lengths


@pytest.mark.usefixtures("profiling")
def test_a_file_that_was_cut_short_is_read(results: Path, tmp_path: Path) -> None:
    import compare
    import figures

    whole = results.read_text().splitlines(keepends=True)
    for keep in (1, 2, 20):
        cut = tmp_path / f"cut{keep}.jsonl"
        cut.write_text("".join(whole[:keep]) + whole[keep][: len(whole[keep]) // 2])
        rows = figures.load(cut)
        assert len(rows) == keep
        assert figures.markdown(rows) and isinstance(figures.roofline(rows), str)
        assert compare.cohorts(rows) is not None
    (tmp_path / "bad.jsonl").write_text(whole[0] + "{\n" + whole[1])
    with pytest.raises(ValueError, match="line 2"):
        figures.load(tmp_path / "bad.jsonl")


def test_make_runs_it_without_a_set_up() -> None:
    for target in ("gpu", "multigpu"):
        command = ["make", "-n", target, "PYTHON=some-python", "BUDGET_S=77"]
        outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside)
        (line,) = done.stdout.strip().splitlines()
        assert line.startswith("some-python profiling/gpu.py") and "--budget-s 77" in line
        assert ("--multi" in line) == (target == "multigpu")
