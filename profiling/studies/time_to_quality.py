"""Held-out position error by iteration, for five ways to run the same algorithm: part of docs/learning.md.

The structure of Flow-GRPO (every step but the last is stochastic and trained, nothing is shared), MixGRPO's window
without sharing, the same with our exact levers, and with the approximations of the fast preset that a CPU profits from
(8 tail steps by sigma, three of four window steps; int8 is emulated here and would cost time); beside it reuse of the
residual with half of the window's steps. T = 25, two groups of eight, three seeds; pace.py measures what an iteration
takes. About 110 CPU-minutes; `make results` runs what is missing, and an interrupted run is continued.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import learning
from record import Scale, config_settings, fingerprint, shipped_base, write_result

from geoalign.jobs.evaluate import METRICS

RESULTS = Path("docs/results/time_to_quality")
CONFIG = "bench_levers"
SHAPE = (
    "groups.conditions=2", "groups.size=8", "train.iterations=120", "eval.every=10", "eval.samples=10",
    "flow.sde=cps", "objective.loss_weight=exact_inverse",  # as the demo; docs/log.md has what flow did
    "data.num_frames=5", "optim.groups=[{pattern: camera_gain, lr: 0.04}]",  # many small, cheap steps
)  # fmt: skip
NOTHING_SHARED = (
    "levers.share_prefix=false", "levers.merge_first_step=false", "levers.prune_source=false", "levers.streaming=off",
)  # fmt: skip
AUDITED = "ode.audit_every=50"  # as paper_64xa800_fast; pace.py times as many iterations
MOVING = ("window.kind=progressive", "window.start=0", "window.max_start=12", "window.interval=25")  # MixGRPO's
ARMS: dict[str, tuple[str, ...]] = {
    "every step stochastic, nothing shared": ("window.kind=fixed", "window.start=0", "window.max_start=0",
                                              "window.size=24", *NOTHING_SHARED),
    "window of 4, nothing shared": (*MOVING, *NOTHING_SHARED),
    "window of 4, exact levers": (*MOVING, "levers.streaming=graphs"),
    "window of 4, exact levers, reuse": (*MOVING, "levers.streaming=graphs", "ode.reuse=residual",
                                         "ode.reuse_share=0.45", AUDITED, "learn.window_steps=2"),
    "window of 4, exact levers, 8 tail steps": (*MOVING, "levers.streaming=graphs", "flow.tail_grid=sigma",
                                                "flow.tail_steps=8", AUDITED, "learn.window_steps=3"),
}  # fmt: skip
KINDS = ("presets", "random")


def overrides(arm: str, seed: int, scale: Scale, *shape: str) -> tuple[str, ...]:
    """Settings of one run; ``shape`` changes its own."""
    return (*SHAPE, *shape, *scale.shorter, *ARMS[arm], f"run.seed={seed}")


def settings(changed: tuple[str, ...]) -> dict[str, Any]:
    """What a run with these overrides depends on."""
    return {**config_settings(CONFIG, changed), "base": shipped_base(), "metrics": METRICS}


def file_of(arm: str, seed: int) -> Path:
    """Result of one run."""
    return RESULTS / f"{learning.slug(arm)}_{seed}.json"


def run(arm: str, seed: int, changed: tuple[str, ...], result: Path, work: Path) -> None:
    """Train, or go on, and write the held-out errors after so many iterations."""
    made_with = settings(changed)
    folder = work / f"{learning.slug(arm)}_{seed}_{fingerprint(made_with)}"
    world = learning.render_world(work, CONFIG)
    places = (f"run.dir={folder}", f"data.root={world}", "run.ranks=1")
    learning.geoalign("train", "--config", CONFIG, "--resume", "auto", *places, *changed)
    summary = json.loads((folder / "summary.json").read_text())
    held_out = summary["held_out"]
    points = [(0, statistics.fmean(held_out[kind]["before"]["translation_error_m"] for kind in KINDS))]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if f"eval/{KINDS[0]}_translation_error_m" in row:
            points.append(
                (row["iteration"] + 1, statistics.fmean(row[f"eval/{kind}_translation_error_m"] for kind in KINDS))
            )
    if points[-1][0] < summary["iterations"]:
        points.append(
            (summary["iterations"], statistics.fmean(held_out[kind]["after"]["translation_error_m"] for kind in KINDS))
        )
    kept = {name: summary[name] for name in ("versions", "device", "cores", "commit", "iterations")}
    write_result(result, {"arm": arm, "seed": seed, "points": points, **kept}, made_with)


def read(path: Path) -> dict[str, Any] | None:
    """A result, or None where it is not made yet."""
    return json.loads(path.read_text()) if path.exists() else None
