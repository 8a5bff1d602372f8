"""Everything that a GPU can tell of this project, in a given time: tests, kernels, one iteration, reward models.

    python profiling/gpu.py [--budget-s 540] [--out FILE.jsonl] [--only STAGE,...]     with the machine's own torch
    python profiling/gpu.py --multi [--budget-s 540]                                   two and more GPUs
    python profiling/gpu.py --self-check                                               any machine, tiny sizes

No set-up and no network: a stage whose packages are missing is a "not run" row that names them. Stages are processes,
in the order of their worth; one that crashes or hangs is a "failed" row, and the others still run. Nothing starts that
could not end in time. All rows go to one file, as they come, the environment first: `figures.py` reads it, also when it
is cut short. Exit code: 0, or 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "ops")]  # scripts of one checkout, not a package

from gpu_tests import environment as child_environment  # noqa: E402

RESERVE_S = 10.0
"""Kept for ending a stage and writing its rows."""
CLOSE_S = 20.0
"""A stage is told that much less than it has, so that it ends by itself, after its last test or ceilings."""
STOP_S = 5.0
"""How long a stage that was told to end may take, before it is killed."""
Row = dict[str, Any]
Start = Callable[[Sequence[str], float], int | None]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of the stage.
        command: script and arguments below `profiling/`; `{out}` and `{budget}` are filled in.
        share_s: the most it may take, out of a budget of 540 seconds; what earlier stages left over is added.
        least_s: it is not started with less.
        needs: modules without which it is not started.
        small: what a self-check adds.
    """

    name: str
    command: tuple[str, ...]
    share_s: float
    least_s: float
    needs: tuple[str, ...]
    small: tuple[str, ...] = ("--self-check",)


TESTS = ("gpu_tests.py", "--out", "{out}", "--budget-s", "{budget}")
OPS = ("ops/bench_ops.py", "--quick", "--out", "{out}", "--budget-s", "{budget}", "--only")
# In the order of their worth: what a wrong kernel would make worthless comes first.
STAGES = (
    Stage("tests", TESTS, 150, 30, ("torch", "triton", "pytest"), ()),
    Stage("attention", (*OPS, "attention"), 110, 25, ("torch", "triton")),
    Stage("prologue and epilogue", (*OPS, "norm,gated"), 70, 25, ("torch", "triton")),
    Stage("iteration", ("model/bench_depth.py", "--one", "--out", "{out}"), 110, 60,
          ("torch", "triton", "pydantic", "yaml", "diffusers", "safetensors")),
    Stage("rewards", ("model/bench_rewards.py", "--quick", "--out", "{out}", "--budget-s", "{budget}"), 60, 30,
          ("torch", "safetensors")),
    Stage("sampler step and feed-forward", (*OPS, "flow,ffn"), 40, 20, ("torch", "triton")),
)  # fmt: skip
MULTI = (
    Stage("engines on NCCL", (*TESTS, "--marker", "multigpu", "--workers", "1"), 540, 60,
          ("torch", "triton", "pytest", "pydantic", "yaml"), ()),
)  # fmt: skip


class Session:
    """One run: what it has of its budget, and the file.

    Args:
        out: result file; stages write beside it, in a folder of its name.
        budget_s: seconds.
        first: the environment row.
        start: runs a command for at most so many seconds; its exit code, or None if it was ended.
        importable: whether a module is there.
        clock: seconds.
    """

    def __init__(
        self, out: Path, budget_s: float, first: Row, *, start: Start, importable: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.out, self.parts = out, out.with_suffix(".parts")
        self.budget_s, self.clock, self.began = budget_s, clock, clock()
        self.start, self.importable, self.first = start, importable, first
        self.parts.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []
        self.steady: list[bool] = []
        out.write_text(json.dumps(first) + "\n")

    @property
    def left_s(self) -> float:
        """Seconds of the budget that remain."""
        return self.budget_s - (self.clock() - self.began)

    def run(self, stages: Iterable[Stage], *, small: bool = False) -> int:
        """All stages that fit; 1 if anything failed. `small`: a self-check."""
        planned = list(stages)
        for place, stage in enumerate(planned):
            later = sum(other.share_s for other in planned[place + 1 :])
            scale = min(1.0, self.budget_s / sum(other.share_s for other in planned))
            self._stage(stage, later * scale, stage.small if small else ())
        self._amend(steady=bool(self.steady) and all(self.steady))
        return 1 if self.failed else 0

    def _stage(self, stage: Stage, later_s: float, arguments: Sequence[str]) -> None:
        missing = [module for module in stage.needs if not self.importable(module)]
        if missing:
            return self._note(stage, "not run", f"not installed: {', '.join(missing)}")
        # What is left beyond the shares of later stages; a short run gives the earlier ones their least at least.
        budget = min(max(self.left_s - later_s, stage.least_s), self.left_s - RESERVE_S)
        if budget < stage.least_s:
            return self._note(stage, "not run", f"out of time: {self.left_s:.0f} s were left")
        part = self.parts / f"{re.sub(r'[^a-z]+', '-', stage.name)}.jsonl"
        part.unlink(missing_ok=True)
        words = [word.format(out=part, budget=f"{max(budget - CLOSE_S, budget / 2):.0f}") for word in stage.command]
        began = self.clock()
        print(f"== {stage.name}: {budget:.0f} of {self.left_s:.0f} s", flush=True)
        code = self.start([sys.executable, str(HERE / words[0]), *words[1:], *arguments], budget)
        rows = read_rows(part)
        broken = [row for row in rows if row.get("status") == "failed"]
        self._merge(stage, rows)
        note = f"{self.clock() - began:.0f} s, {len(rows)} rows, {len(broken)} failed"
        if code is None:
            note += "; ended by the budget"
        elif code and not broken:
            note += f"; exit code {code}"
        return self._note(stage, "failed" if code else "ok", note)

    def _merge(self, stage: Stage, rows: list[Row]) -> None:
        with self.out.open("a") as file:
            for row in rows:
                if row.get("kind") == "environment":
                    self.steady.append(bool(row.get("steady")))
                    self._learn(row)
                else:
                    file.write(json.dumps({**row, "stage": stage.name}) + "\n")

    def _learn(self, row: Row) -> None:
        """What only a stage knows of the machine: versions of rivals, clocks after the last ceilings."""
        known = {key: value for key, value in row.items() if key not in ("run_id", "command", "steady") and value}
        self.first = {**known, **{key: value for key, value in self.first.items() if value is not None}}
        self.first["clocks_after"] = row.get("clocks_after") or self.first.get("clocks_after")

    def _note(self, stage: Stage, status: str, note: str) -> None:
        if status == "failed":
            self.failed.append(stage.name)
        row = {"kind": "stage", "name": stage.name, "status": status, "note": note}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"== {stage.name}: {status}: {note}", flush=True)

    def _amend(self, **last: Any) -> None:
        """Completes the environment row; the file is replaced at once or not at all."""
        lines = self.out.read_text().splitlines(keepends=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.first, **last}) + "\n" + "".join(lines[1:]))
        os.replace(temporary, self.out)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may have been cut off in the middle of a line, or not begun."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def run_process(command: Sequence[str], limit_s: float) -> int | None:
    """Exit code of a command, or None if it was ended after `limit_s`; it and what it started form one group."""
    process = subprocess.Popen(command, env=child_environment(), start_new_session=True)
    for how, wait_s in ((None, limit_s), (signal.SIGTERM, STOP_S), (signal.SIGKILL, None)):
        if how is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(wait_s)
            return code if how is None else None
    return None


def default_out(first: Row) -> Path:
    """profiling/results/<utc>-<device>-<commit>.jsonl"""
    device = re.sub(r"[^a-z0-9]+", "-", str(first["device"]).lower()).strip("-")
    return HERE / "results" / f"{first['run_id']}-{device}-{first['commit'] or 'nogit'}.jsonl"


def main() -> int:
    """Entry point; 2 where torch is missing or there are too few devices."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--out", type=Path, help="default: profiling/results/<utc>-<device>-<commit>.jsonl")
    parser.add_argument("--only", default="", help="stages whose name contains one of these parts (a,b)")
    parser.add_argument("--multi", action="store_true", help="every engine on several GPUs against one process")
    parser.add_argument("--self-check", action="store_true", help="tiny sizes on the CPU: exercises the stages only")
    options = parser.parse_args()
    try:
        import torch
        from bench_timing import environment, installed
    except ModuleNotFoundError as error:
        print(f"this needs torch: {error}", file=sys.stderr)
        return 2
    found, wanted = torch.cuda.device_count(), 2 if options.multi else 1
    if found < wanted and not options.self_check:
        print(f"{found} CUDA devices, {wanted} wanted: use --self-check", file=sys.stderr)
        return 2
    run_id = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    first = environment(torch.device("cpu" if options.self_check else "cuda"), run_id)
    out = options.out or default_out(first)
    stages = [s for s in (MULTI if options.multi else STAGES) if any(p in s.name for p in options.only.split(","))]
    session = Session(out, options.budget_s, first, start=run_process, importable=installed)
    code = session.run(stages, small=options.self_check)
    print(f"wrote {out}\nread it with: python profiling/figures.py {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
