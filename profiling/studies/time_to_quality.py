"""Held-out position error against CPU seconds, for five ways to run the same algorithm: part of docs/learning.md.

The structure of Flow-GRPO (every step but the last is stochastic and trained, nothing is shared), MixGRPO's window
without sharing, the same with our exact levers, and with the approximations of the fast preset that a CPU profits from
(8 tail steps by sigma, three of four window steps; int8 is emulated here and would cost time); beside it reuse of the
residual with half of the window's steps. T = 25, two groups of eight, three seeds. About 110 CPU-minutes;
`make results` runs what is missing, and an interrupted run is continued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import learning
from record import WHOLE, Scale, config_settings, fingerprint, shipped_base, write_result

from geoalign.jobs.evaluate import METRICS
from geoalign.report.svg import number

RESULTS, FIGURE = Path("docs/results/time_to_quality"), Path("docs/images/time_to_quality.svg")
CONFIG, TARGET = "bench_levers", 0.95
"""Quality is reached where the error has fallen to ``TARGET`` of the base's."""
SHAPE = (
    "groups.conditions=2", "groups.size=8", "train.iterations=120", "eval.every=10", "eval.samples=10",
    "flow.sde=cps", "objective.loss_weight=exact_inverse",  # as the demo; docs/log.md has what flow did
    "data.num_frames=5", "optim.groups=[{pattern: camera_gain, lr: 0.04}]",  # many small, cheap steps
)  # fmt: skip
NOTHING_SHARED = (
    "levers.share_prefix=false", "levers.merge_first_step=false", "levers.prune_source=false", "levers.streaming=off",
)  # fmt: skip
MOVING = ("window.kind=progressive", "window.start=0", "window.max_start=12", "window.interval=25")  # MixGRPO's
ARMS: dict[str, tuple[str, ...]] = {
    "every step stochastic, nothing shared": ("window.kind=fixed", "window.start=0", "window.max_start=0",
                                              "window.size=24", *NOTHING_SHARED),
    "window of 4, nothing shared": (*MOVING, *NOTHING_SHARED),
    "window of 4, exact levers": (*MOVING, "levers.streaming=graphs"),
    "window of 4, exact levers, reuse": (*MOVING, "levers.streaming=graphs", "ode.reuse=residual",
                                         "ode.reuse_share=0.45", "ode.audit_every=20", "learn.window_steps=2"),
    "window of 4, exact levers, 8 tail steps": (*MOVING, "levers.streaming=graphs", "flow.tail_grid=sigma",
                                                "flow.tail_steps=8", "ode.audit_every=20", "learn.window_steps=3"),
}  # fmt: skip
REFERENCES = ("every step stochastic, nothing shared", "window of 4, nothing shared")
KINDS = ("presets", "random")


def overrides(arm: str, seed: int, scale: Scale) -> tuple[str, ...]:
    """Settings of one run."""
    return (*SHAPE, *scale.shorter, *ARMS[arm], f"run.seed={seed}")


def settings(changed: tuple[str, ...]) -> dict[str, Any]:
    """What a run with these overrides depends on."""
    return {**config_settings(CONFIG, changed), "base": shipped_base(), "metrics": METRICS}


def file_of(arm: str, seed: int) -> Path:
    """Result of one run."""
    return RESULTS / f"{learning.slug(arm)}_{seed}.json"


def run(arm: str, seed: int, changed: tuple[str, ...], result: Path, work: Path) -> None:
    """Train, or go on, and write CPU seconds and held-out errors."""
    made_with = settings(changed)
    folder = work / f"{learning.slug(arm)}_{seed}_{fingerprint(made_with)}"
    world = learning.render_world(work, CONFIG)
    places = (f"run.dir={folder}", f"data.root={world}", "run.ranks=1")
    learning.geoalign("train", "--config", CONFIG, "--resume", "auto", *places, *changed)
    summary = json.loads((folder / "summary.json").read_text())
    before = summary["held_out"]
    points = [(0.0, _mean({kind: before[kind]["before"]["translation_error_m"] for kind in KINDS}))]
    spent = 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        spent += row["perf/cpu_s"]
        if f"eval/{KINDS[0]}_translation_error_m" in row:
            points.append((spent, _mean({kind: row[f"eval/{kind}_translation_error_m"] for kind in KINDS})))
    points.append((spent, _mean({kind: before[kind]["after"]["translation_error_m"] for kind in KINDS})))
    kept = {name: summary[name] for name in ("versions", "device", "cores", "commit", "iterations")}
    write_result(result, {"arm": arm, "seed": seed, "points": points, **kept}, made_with)


def reached(points: Sequence[Sequence[float]]) -> float:
    """CPU seconds at which the error first falls to the stated one, linear between evaluations; NaN: never."""
    target = TARGET * points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1) if y0 > target else x0
    return float("nan")


def table(root: Path) -> str:
    """Seconds to the stated error for every structure, and the factors between them; seeds apart."""
    found = _results(root)
    heads = ("structure", "CPU seconds an iteration", "to the error, by seed", "error at the end (m)")
    over = [f"times as fast as {arm!r}".replace("'", "*") for arm in REFERENCES]
    lines = [f"| {' | '.join((*heads, *over))} |", f"|{' --- |' * (len(heads) + len(over))}"]
    for arm in ARMS:
        mine = [run for (name, _), run in found.items() if name == arm]
        if not mine:
            lines.append(f"| {arm} | not run |{' |' * (len(heads) + len(over) - 2)}")
            continue
        each = [run["points"][-1][0] / run["iterations"] for run in mine]
        told = ", ".join(_told(reached(run["points"])) for run in mine)
        factors = (_factors(found, arm, other) for other in REFERENCES)
        ends = span([run["points"][-1][1] for run in mine], 3)
        lines.append(f"| {' | '.join((arm, f'{sum(each) / len(each):.2f}', told, ends, *factors))} |")
    error = sorted({f"{TARGET * run['points'][0][1]:.3f} m" for run in found.values()})
    note = f"The stated error is {TARGET:.0%} of the base's: {', '.join(error) or 'not run'}."
    picture = [f"![Error against CPU seconds]({FIGURE.relative_to('docs')})"] if found else []
    told = (
        f"{note} T = 25, two groups of eight; CPU seconds of training alone, without evaluation; mean (smallest to "
        "largest) over seeds."
    )
    return "\n\n".join(["\n".join(lines), *picture, told])


def _factors(found: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, other: str) -> str:
    """How many times as fast as ``other`` an arm is, seed by seed; where ``other`` alone stays above the error, its
    whole run is what it took at least."""
    if arm == other:
        return ""
    pairs = [(found[other, s]["points"], found[arm, s]["points"]) for s in WHOLE.seeds
             if {(arm, s), (other, s)} <= found.keys()]  # fmt: skip
    bound = "at least " if any(reached(points) != reached(points) for points, _ in pairs) else ""
    times = [(reached(theirs), theirs[-1][0], reached(ours)) for theirs, ours in pairs]
    return bound + span([(whole if needed != needed else needed) / mine for needed, whole, mine in times])


def draw(root: Path) -> None:
    """The curves of all seeds as a picture; nothing before there are results."""
    found = _results(root)
    if not found:
        return
    from matplotlib.figure import Figure  # without a window

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(ARMS):
        runs = [run for (name, _), run in found.items() if name == arm]
        for run in runs:
            label = arm if run is runs[0] else None
            axes.plot(*zip(*run["points"], strict=True), color=f"C{place}", label=label, linewidth=1)
    axes.set(xscale="symlog", xlabel="CPU seconds of training", ylabel="held-out position error (m)")
    axes.legend(fontsize=8, frameon=False)
    (root / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(root / FIGURE, metadata={"Date": None})  # or every drawing would be another file


def _results(root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    paths = {(arm, seed): root / file_of(arm, seed) for arm in ARMS for seed in WHOLE.seeds}
    return {key: result for key, path in paths.items() if (result := read(path))}


def read(path: Path) -> dict[str, Any] | None:
    """A result, or None where it is not made yet."""
    return json.loads(path.read_text()) if path.exists() else None


def _told(seconds: float) -> str:
    return "not reached" if seconds != seconds else number(seconds)


def span(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean, and smallest to largest; "not reached" where no value is a number."""
    defined = [value for value in values if value == value]
    if not defined:
        return "not reached"
    lowest, highest, middle = min(defined), max(defined), sum(defined) / len(defined)
    missing = f", {len(values) - len(defined)} not reached" if len(defined) < len(values) else ""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{middle:{form}} ({lowest:{form}} to {highest:{form}}){missing}"


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
