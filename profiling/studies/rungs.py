"""Does a policy still learn what it should where a rung CHANGES its training? Part of docs/learning.md.

The setting of ``time_to_quality.py`` with all exact levers, half as long, three seeds: by itself, with each rung of the
ladder that the embedded default has, and with a tail of one step, which no fidelity accepts. About 60 CPU-minutes;
`make results` runs what is missing, and an interrupted run is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import learning
import time_to_quality as timed
from record import WHOLE, Scale
from time_to_quality_tables import made_at, span

from geoalign.jobs.ladder import RUNGS

RESULTS = Path("docs/results/rungs")
EXACT = "window of 4, exact levers"
ARMS = {
    "exact levers": EXACT,
    "reuse at 45 %, gradients of 2 of 4 window steps": "window of 4, exact levers, reuse",
    "8 steps by sigma, gradients of 3 of 4 window steps": "window of 4, exact levers, 8 tail steps",
}
"""The arms of time to quality that stand in this table too."""
_HALVES = {"half_window": 2, "half_group": 4}
_NEEDED = {"the most telling half of the members": ("groups.rows_per_forward=1",)}  # as long videos have it
ITERATIONS = 60
_SHAPE = (f"train.iterations={ITERATIONS}", "eval.every=1000")  # no curve

_NAMES = (
    "45 % of the steps, others reuse, int8",
    "gradients of a random half of the window",
    "30 % of the steps, others reuse",
    "8 steps by sigma",
    "40 % of the time grid (MixGRPO-Flash)",
    "the most telling half of the members",
)
_OF_THE_LADDER = {rung.name: rung.settings for rung in RUNGS}
CHANGED: dict[str, tuple[str, ...]] = {
    **{name: (*_NEEDED.get(name, ()), *_OF_THE_LADDER[name].format(**_HALVES).split()) for name in _NAMES},
    "3 of 5 frames in half of the iterations": ("learn.short_frames=3", f"learn.short_iterations={ITERATIONS // 2}"),
    "control: a tail of one step": ("flow.tail_steps=1",),
}
"""Rungs, one approximation of each kind; HPSv3's frames are missing, because this world has no aesthetic scorer."""


def overrides(name: str, seed: int, scale: Scale) -> tuple[str, ...]:
    """Settings of one run; what a rung sets comes last."""
    return (*timed.overrides(EXACT, seed, scale, *_SHAPE), *CHANGED[name])


def file_of(name: str, seed: int) -> Path:
    """Result of one run."""
    return RESULTS / f"{learning.slug(name)}_{seed}.json"


def table(root: Path) -> str:
    """The error before and after for every rung, over seeds, and beside the exact run of the same seed."""
    runs = {name: [timed.read(root / timed.file_of(arm, seed)) for seed in WHOLE.seeds] for name, arm in ARMS.items()}
    runs |= {name: [timed.read(root / file_of(name, seed)) for seed in WHOLE.seeds] for name in CHANGED}
    exact = runs["exact levers"]
    lines = [
        f"| rung | error after {ITERATIONS} iterations (m) | change | beside exact, same seed (m) |",
        "| --- | --- | --- | --- |",
        *(_line(name, made, exact) for name, made in runs.items()),
    ]
    note = (
        "Mean over three seeds (smallest to largest); base, sampler and groups as above, "
        "16 rollouts an iteration: far from converged, so this finds a rung that teaches something else, not one that "
        "costs a few per cent. int8 is emulated on a CPU."
        f"{made_at(run for made in runs.values() for run in made if run)}"
    )
    return "\n\n".join(["\n".join(lines), note])


def _line(name: str, runs: Sequence[dict[str, Any] | None], exact: Sequence[dict[str, Any] | None]) -> str:
    made = [run for run in runs if run]
    if not made:
        return f"| {name} | not run | | |"
    ends = [_error(run) for run in made]
    changes = [100 * (_error(run) / run["points"][0][1] - 1) for run in made]
    pairs = [
        _error(mine) - _error(other)
        for mine, other in zip(runs, exact, strict=True)
        if mine and other and mine is not other
    ]
    beside = span(pairs, 3, signed=True) if pairs else ""
    change = f"{sum(changes) / len(changes):+.0f} % ({min(changes):+.0f} to {max(changes):+.0f})"
    return f"| {name} | {span(ends, 3)} | {change} | {beside} |"


def _error(run: dict[str, Any]) -> float:
    """Of the last evaluation up to ``ITERATIONS``; the runs of time to quality go on."""
    return [error for done, error in run["points"] if done <= ITERATIONS][-1]
