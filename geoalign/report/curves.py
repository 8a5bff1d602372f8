"""Curves over the iterations and the time of each phase."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import SMOOTHING, Line, line_chart, number, smooth, stacked_bar
from geoalign.report.words import CURVE_NAMES, CURVES, CurveGroup

MAX_PHASES = 8
SCORING = "scoring"


def curves_section(run: RunRecord) -> str:
    """Compose all curves by group; nothing when the run wrote no metrics."""
    taken: dict[str, list[str]] = {group.title: [] for group in CURVES}
    for key in run.metric_keys(""):
        if group := _group_of(key):
            taken[group.title].append(key)
    blocks = [block for group in CURVES if (block := _group(run, group, taken[group.title]))]
    if not blocks:
        return ""
    return f"""<section id="curves"><h2>How it learnt</h2>
<p>One point per iteration; the bold line is a moving average, of held-out checks the values themselves, whose first
and last stand above it. Rest the pointer on a curve to read a value.</p>
{"".join(blocks)}</section>"""


def compared_curves(runs: Sequence[tuple[str, RunRecord]]) -> str:
    """The curves of several runs (name, run) on one axis each, coloured by position; constant ones are left out."""
    keys = dict.fromkeys(key for _, run in runs for key in run.metric_keys(""))
    blocks = []
    for group in CURVES:
        charts = [_compared(runs, key, group) for key in keys if group is _group_of(key)]
        if drawn := "".join(charts):
            blocks.append(_framed(group, f'<div class="charts">{drawn}</div>'))
    if not blocks:
        return ""
    return f"""<section id="curves"><h2>How they learnt</h2><p>One point per iteration, one colour a run; the bold line
is a moving average, of held-out checks the values themselves. Rest the pointer on a curve to read a
value.</p>{"".join(blocks)}</section>"""


def _compared(runs: Sequence[tuple[str, RunRecord]], key: str, group: CurveGroup) -> str:
    series = [(index, name, *run.series(key)) for index, (name, run) in enumerate(runs, 1)]
    lines = [Line(name, steps, values, f"series-{index}") for index, name, steps, values in series if values]
    if len({value for line in lines for value in line.y}) < 2:
        return ""
    chart = line_chart(lines, title=key, zero=group.with_zero, smoothing=_smoothing(group))
    name = escape(curve_name(key.removeprefix(group.prefix)))
    return f"<figure><figcaption><b>{name}</b></figcaption>{chart}</figure>"


def _group_of(key: str) -> CurveGroup | None:
    return next((group for group in CURVES if group.takes(key)), None)


def _group(run: RunRecord, group: CurveGroup, keys: Iterable[str]) -> str:
    """The charts of a group; what never changed is one line of text."""
    charts, constant = [], []
    for key in keys:
        steps, values = run.series(key)
        if not values or (group.hide_zeros and not any(values)):
            continue
        label = key.removeprefix(group.prefix)
        if len(set(values)) == 1:
            constant.append(f"{escape(curve_name(label))} <b>{number(values[0])}</b>")
        else:
            charts.append(_chart(Line(label, steps, values), key, group))
    if not charts and not constant:
        return ""
    drawn = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    listed = f'<p class="constant">In every iteration: {", ".join(constant)}.</p>' if constant else ""
    return _framed(group, drawn + listed)


def _framed(group: CurveGroup, content: str) -> str:
    inside = f'<p class="note">{group.meaning}</p>{content}'
    if group.folded:
        return f"<details><summary>{group.title}</summary>{inside}</details>"
    return f"<h3>{group.title}</h3>{inside}"


def _smoothing(group: CurveGroup) -> float:
    return 0.0 if group.fixed else SMOOTHING


def _chart(line: Line, title: str, group: CurveGroup) -> str:
    ends = smooth(line.y, _smoothing(group))
    trend = f"{number(ends[0])} &rarr; {number(ends[-1])}"
    caption = f'<b>{escape(curve_name(line.label))}</b><span class="now">{trend}</span>'
    chart = line_chart([line], title=title, zero=group.with_zero, smoothing=_smoothing(group))
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def phases_section(run: RunRecord) -> str:
    """Show the mean seconds of the phases that follow one another; what runs inside ``scoring`` is named there."""
    means = {
        key.removeprefix("time/").removesuffix("_s"): _mean(run.series(key)[1]) for key in run.metric_keys("time/")
    }
    total, inside = means.get("iteration", 0.0), {name: means[name] for name in means if _inside_scoring(name, means)}
    leaves = {name: seconds for name, seconds in means.items() if seconds > 0 and name not in inside}
    leaves = {name: leaves[name] for name in leaves if not _is_no_leaf(name, leaves)}
    if not leaves or not total:
        return ""
    ranked = sorted(leaves.items(), key=lambda item: -item[1])
    kept, rest = ranked[: MAX_PHASES - 1], total - sum(seconds for _, seconds in ranked[: MAX_PHASES - 1])
    if rest > 0:
        kept.append(("all else", rest))
    rows = "".join(
        f'<tr><td><span class="swatch fill-{index % 8 + 1}"></span>{escape(_unsnake(name))}'
        f"{_parts(inside) if name == SCORING else ''}</td>"
        f"<td>{number(seconds)}</td><td>{100 * seconds / total:.0f}&thinsp;%</td></tr>"
        for index, (name, seconds) in enumerate(kept)
    )
    return f"""<section id="time"><h2>Where the time went</h2><p>Mean of an iteration: {number(total)} seconds.</p>
{stacked_bar(kept)}<table><thead><tr><th>phase</th><th>seconds per iteration</th><th>share</th></tr></thead>
<tbody>{rows}</tbody></table></section>"""


def _inside_scoring(name: str, names: Iterable[str]) -> bool:
    return SCORING in names and (name == "rollout/decode" or name.startswith("reward/"))


def _is_no_leaf(name: str, names: Iterable[str]) -> bool:
    """Whole iterations, the unnamed rest, waiting inside other phases, and phases that contain others."""
    sums = ("iteration", "between", "other")
    return name in sums or name.startswith("sync/") or any(other.startswith(name + "/") for other in names)


def _parts(inside: Mapping[str, float]) -> str:
    listed = ", ".join(f"{escape(_unsnake(name))} {number(seconds)}" for name, seconds in inside.items() if seconds > 0)
    return f" <small>in it: {listed}</small>" if listed else ""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0


def curve_name(label: str) -> str:
    """What stands above a curve whose key ends in ``label``."""
    return CURVE_NAMES.get(label) or _unsnake(label)


def _unsnake(name: str) -> str:
    return name.replace("_", " ").replace("/", " / ")
