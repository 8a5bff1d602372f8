"""What the curves of time_to_quality.py and the seconds of pace.py say: table and picture of docs/learning.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pace
from record import WHOLE
from time_to_quality import ARMS, file_of, read

FIGURE = Path("docs/images/time_to_quality.svg")
TARGET = 0.95
"""Quality is reached where the error has fallen to ``TARGET`` of the base's."""
REFERENCES = ("every step stochastic, nothing shared", "window of 4, nothing shared")
NOT_RUN, NAN = "not run", float("nan")
Runs = Mapping[tuple[str, int], Mapping[str, Any]]


def table(root: Path) -> str:
    """Seconds to the stated error for every structure, and the factors between them; seeds apart."""
    found, seconds = _results(root), pace.seconds(root)
    heads = (
        "structure",
        "CPU seconds an iteration",
        "iterations to the error, by seed",
        "seconds to it",
        "error at the end (m)",
    )
    over = [f"times as fast as {arm!r}".replace("'", "*") for arm in REFERENCES]
    lines = [f"| {' | '.join((*heads, *over))} |", f"|{' --- |' * (len(heads) + len(over))}"]
    for arm in ARMS:
        mine = [run for (name, _), run in found.items() if name == arm]
        each = f"{seconds[arm]:.2f}" if arm in seconds else NOT_RUN
        if not mine:
            lines.append(f"| {arm} | {each} | {NOT_RUN} |{' |' * (len(heads) + len(over) - 3)}")
            continue
        needed = [reached(run["points"]) for run in mine]
        told = ", ".join("not reached" if value != value else f"{value:.0f}" for value in needed)
        took = span([value * seconds.get(arm, NAN) for value in needed], 0)
        factors = (_factors(found, seconds, arm, other) for other in REFERENCES)
        ends = span([run["points"][-1][1] for run in mine], 3)
        lines.append(f"| {' | '.join((arm, each, told, took, ends, *factors))} |")
    error = sorted({f"{TARGET * run['points'][0][1]:.3f} m" for run in found.values()})
    picture = [f"![Error against CPU seconds]({FIGURE.relative_to('docs')})"] if found else []
    note = (
        f"The stated error is {TARGET:.0%} of the base's: {', '.join(error) or NOT_RUN}. T = 25, two groups of eight. "
        "Seconds of training alone, without evaluation, timed in turns in one process; mean (smallest to largest) over "
        "seeds."
    )
    return "\n\n".join(["\n".join(lines), *picture, note + _ended_early(found) + _provenance(root, found)])


def _provenance(root: Path, found: Runs) -> str:
    """Hardware and commits of the curves and of the pace."""
    timed = read(root / pace.RESULT)
    return made_at(found.values(), f", timed at {timed['environment']['commit']}" if timed else "")


def made_at(runs: Iterable[Mapping[str, Any]], also: str = "") -> str:
    """Hardware and commits of runs, ``also`` behind them, as the last sentence of a note; empty without runs."""
    made = list(runs)
    devices = sorted({f"{run['device']}, {run['cores']} cores" for run in made})
    commits = ", ".join(sorted({run["commit"] for run in made}))
    return f" {'; '.join(devices)}; commit {commits}{also}." if made else ""


def _ended_early(found: Runs) -> str:
    """Which structures have runs that were ended before the others, so that their last errors do not compare."""
    most = max((run["iterations"] for run in found.values()), default=0)
    early = {arm: run["iterations"] for (arm, _), run in found.items() if run["iterations"] < most}
    told = "; ".join(f"*{arm}* after {done} of {most} iterations" for arm, done in early.items())
    return f" Ended once they had reached the error, so the error at the end is of then: {told}." if told else ""


def reached(points: Sequence[Sequence[float]]) -> float:
    """Iterations after which the error first falls to the stated one, linear between evaluations; NaN: never."""
    target = TARGET * points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1) if y0 > target else x0
    return NAN


def _factors(found: Runs, seconds: Mapping[str, float], arm: str, other: str) -> str:
    """How many times as fast as ``other`` an arm is, seed by seed; where ``other`` alone stays above the error, its
    whole run is what it took at least."""
    if arm == other or not {arm, other} <= seconds.keys():
        return ""
    pairs = [(found[other, s]["points"], found[arm, s]["points"]) for s in WHOLE.seeds
             if {(arm, s), (other, s)} <= found.keys()]  # fmt: skip
    bound = "at least " if any(reached(theirs) != reached(theirs) for theirs, _ in pairs) else ""
    times = [(reached(theirs), theirs[-1][0], reached(ours)) for theirs, ours in pairs]
    ratio = seconds[other] / seconds[arm]
    return bound + span([ratio * (whole if needed != needed else needed) / mine for needed, whole, mine in times])


def draw(root: Path) -> None:
    """The curves of all seeds as a picture; nothing before there are results."""
    found, seconds = _results(root), pace.seconds(root)
    if not found or not seconds:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without a window

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arm for arm in ARMS if arm in seconds):
        runs = [run for (name, _), run in found.items() if name == arm]
        for run in runs:
            label = arm if run is runs[0] else None
            spent = [seconds[arm] * done for done, _ in run["points"]]
            axes.plot(spent, [error for _, error in run["points"]], color=f"C{place}", label=label, linewidth=1)
    axes.set(xscale="symlog", xlabel="CPU seconds of training", ylabel="held-out position error (m)")
    axes.legend(fontsize=8, frameon=False)
    (root / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": FIGURE.stem}):  # and no date, or every drawing would be another file
        figure.savefig(root / FIGURE, metadata={"Date": None})


def _results(root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    paths = {(arm, seed): root / file_of(arm, seed) for arm in ARMS for seed in WHOLE.seeds}
    return {key: result for key, path in paths.items() if (result := read(path))}


def span(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean, and smallest to largest; "not reached" where no value is a number."""
    defined = [value for value in values if value == value]
    if not defined:
        return "not reached"
    lowest, highest, middle = min(defined), max(defined), sum(defined) / len(defined)
    missing = f", {len(values) - len(defined)} not reached" if len(defined) < len(values) else ""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{middle:{form}} ({lowest:{form}} to {highest:{form}}){missing}"
