"""Everything that a GPU can tell of this project, in a given time: tests, kernels, one iteration, reward models.

    python profiling/gpu.py [--budget-s 540] [--out FILE.jsonl] [--only STAGE,...]     with the machine's own torch
    python profiling/gpu.py --multi [--budget-s 540]                                   two and more GPUs
    python profiling/gpu.py --self-check                                               any machine, tiny sizes

No set-up and no network: a stage whose packages are missing is a "not run" row that names them. Stages are processes,
in the order of their worth; one that crashes is a "failed" row, one that hangs is ended and says so, and the others
still run. A stage is told by when it has to end, and starts nothing that it does not expect to end by then. All rows go
to one file, stage by stage, the environment first; what a stage has written so far lies beside it. A row says whether
the ceilings of its stage were steady. `figures.py` reads the file, also when it is cut short. Exit code: 0, or 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "ops")]  # scripts of one checkout, not a package

from deadline import Deadline  # noqa: E402
from gpu_tests import Row, end_groups, leave_when_told, read_rows  # noqa: E402
from gpu_tests import environment as child_environment  # noqa: E402

RESERVE_S = 10.0
"""Kept for ending a stage and writing its rows."""
CLOSE_S = 5.0
"""A stage is told that much less than it has, so that it ends by itself."""
STOP_S = 4.0
"""How long a stage that was told to end may take, before it is killed: it has processes of its own to end."""
OF_STAGE = ("steady", "ceilings_moved", "clocks_before", "clocks_after")
"""What the environment row of a stage says of that stage alone."""
Start = Callable[[Sequence[str], float], int | None]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of the stage.
        command: script and arguments below `profiling/`; `{out}` and `{until}` are filled in.
        share_s: its part of a budget of 540 seconds; what earlier stages left over is added.
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


TIMED = ("--out", "{out}", "--until", "{until}")
TESTS = ("gpu_tests.py", *TIMED)
OPS = ("ops/bench_ops.py", "--quick", *TIMED, "--only")
# In the order of their worth: what a wrong kernel would make worthless comes first. A share holds what its stage is
# predicted to take on the slowest card (tests/profiling/test_shares.py), but for the rivals that torch.compile makes:
# they come last and take what is left.
STAGES = (
    Stage("tests", TESTS, 115, 30, ("torch", "triton", "pytest"), ()),
    Stage("attention", (*OPS, "attention"), 95, 45, ("torch", "triton")),
    Stage("prologue and epilogue", (*OPS, "norm,gated"), 72, 45, ("torch", "triton")),
    Stage("iteration", ("model/bench_depth.py", "--one", *TIMED), 134, 90,
          ("torch", "triton", "pydantic", "yaml", "diffusers", "safetensors")),
    Stage("rewards", ("model/bench_rewards.py", "--quick", *TIMED), 74, 45, ("torch", "safetensors")),
    Stage("sampler step and feed-forward", (*OPS, "flow,ffn"), 50, 40, ("torch", "triton")),
)  # fmt: skip
MULTI = (
    Stage("engines on NCCL", (*TESTS, "--marker", "multigpu", "--workers", "1"), 540, 90,
          ("torch", "triton", "pytest", "pydantic", "yaml", "safetensors"), ()),
)  # fmt: skip


class Session:
    """One run: by when it has to end, and its rows.

    Args:
        out: result file; stages write beside it, in a folder of its name.
        deadline: of the run.
        first: the environment row.
        start: runs a command for at most so many seconds; its exit code, or None if it was ended.
        importable: whether a module is there.
    """

    def __init__(
        self, out: Path, deadline: Deadline, first: Row, *, start: Start, importable: Callable[[str], bool]
    ) -> None:
        self.out, self.parts = out, out.with_suffix(".parts")
        self.deadline, self.start, self.importable = deadline, start, importable
        self.first, self.rows = first, [first]
        self.parts.mkdir(parents=True, exist_ok=True)
        self._write()

    def run(self, stages: Iterable[Stage], *, small: bool = False) -> int:
        """All stages that can run and fit; 1 if anything failed. `small`: a self-check."""
        planned = []
        for stage in stages:
            missing = [module for module in stage.needs if not self.importable(module)]
            if missing:
                self._note(stage, "not run", f"not installed: {', '.join(missing)}")
            else:
                planned.append(stage)
        scale = self.deadline.left_s / sum(stage.share_s for stage in planned) if planned else 0.0
        for place, stage in enumerate(planned):
            later = sum(other.share_s for other in planned[place + 1 :])
            self._stage(stage, later * scale, stage.small if small else ())
        return int(any(row["kind"] == "stage" and row["status"] == "failed" for row in self.rows))

    def _stage(self, stage: Stage, later_s: float, arguments: Sequence[str]) -> None:
        # What is left beyond the shares of later stages; a short run gives the earlier ones their least at least.
        left = self.deadline.left_s
        budget = min(max(left - later_s, stage.least_s), left - RESERVE_S)
        if budget < stage.least_s:
            return self._note(stage, "not run", f"out of time: {left:.0f} s were left")
        part = self.parts / f"{re.sub(r'[^a-z]+', '-', stage.name)}.jsonl"
        part.unlink(missing_ok=True)
        until = self.deadline.clock() + budget - CLOSE_S
        words = [word.format(out=part, until=f"{until:.1f}") for word in stage.command]
        print(f"== {stage.name}: {budget:.0f} of {left:.0f} s", flush=True)
        code, ended = None, "interrupted"
        try:
            code = self.start([sys.executable, str(HERE / words[0]), *words[1:], *arguments], budget)
            ended = "ended by the budget"
        finally:
            rows = read_rows(part)
            broken = sum(row.get("status") == "failed" for row in rows)
            note = f"{left - self.deadline.left_s:.0f} s, {len(rows)} rows, {broken} failed"
            if code is None:
                note += f"; {ended}"
            elif code and not broken:
                note += f"; exit code {code}"
            self._note(stage, "failed" if code or broken else "ok", note, rows)

    def _note(self, stage: Stage, status: str, note: str, rows: Sequence[Row] = ()) -> None:
        """The rows of a stage and the row of the stage, which say whether its ceilings were steady."""
        own: Row = {}
        for row in rows:
            if row["kind"] == "environment":
                own = {key: row.get(key) for key in OF_STAGE}
                # What only a stage knows of the machine: versions of rivals.
                known = {key: value for key, value in row.items() if key not in ("run_id", "command", *OF_STAGE)}
                self.first |= {key: value for key, value in known.items() if value and self.first.get(key) is None}
            elif row["kind"] != "progress":
                self.rows.append(row | {"stage": stage.name, "steady": own.get("steady")})
        self.rows.append({"kind": "stage", "name": stage.name, "status": status, "note": note, **own})
        # That of the stages that took both ceilings: one that was cut short says nothing of the others.
        judged = [row["steady"] for row in self.rows if row["kind"] == "stage" and row.get("steady") is not None]
        clocks = [row["clocks_after"] for row in self.rows if row["kind"] == "stage" and row.get("clocks_after")]
        self.first |= {"steady": all(judged) if judged else None, "clocks_after": clocks[-1] if clocks else None}
        self._write()
        print(f"== {stage.name}: {status}: {note}", flush=True)

    def _write(self) -> None:
        """The file is replaced at once or not at all."""
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(temporary, self.out)


def run_process(command: Sequence[str], limit_s: float) -> int | None:
    """Exit code of a command, or None if it was ended after `limit_s`; it and what it started form one group."""
    process = subprocess.Popen(command, env=child_environment(), start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also on ^C: nothing may stay on the device
        end_groups([process], STOP_S)


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
    began = time.time()
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
    leave_when_told()
    first = environment(torch.device("cpu" if options.self_check else "cuda"), run_id)
    out = options.out or default_out(first)
    stages = [s for s in (MULTI if options.multi else STAGES) if any(p in s.name for p in options.only.split(","))]
    session = Session(out, Deadline(began + options.budget_s), first, start=run_process, importable=installed)
    code = session.run(stages, small=options.self_check)
    print(f"wrote {out}\nread it with: python profiling/figures.py {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
