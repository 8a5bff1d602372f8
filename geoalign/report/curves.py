"""Curves over the iterations and the time of each phase."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from html import escape

from geoalign.report.run_folder import Run
from geoalign.report.svg import Line, line_chart, number, stacked_bar
from geoalign.report.words import CURVES, CurveGroup

MAX_PHASES = 8


def curves_section(run: Run) -> str:
    """Compose all curves by group; nothing when the run wrote no metrics."""
    taken: dict[str, list[str]] = {group.title: [] for group in CURVES}
    for key in run.metric_keys(""):
        group = next((group for group in CURVES if group.takes(key)), None)
        if group:
            taken[group.title].append(_chart(run, key, group))
    blocks = [
        f'<h3>{group.title}</h3><p class="note">{group.meaning}</p><div class="charts">{charts}</div>'
        for group in CURVES
        if (charts := "".join(taken[group.title]))
    ]
    if not blocks:
        return ""
    return f"""<section id="curves"><h2>How it learnt</h2>
<p>One point per iteration; the bold line is a moving average. Rest the pointer on a curve to read a value.</p>
{"".join(blocks)}</section>"""


def _chart(run: Run, key: str, group: CurveGroup) -> str:
    steps, values = run.series(key)
    if not values or (group.hide_zeros and not any(values)):
        return ""
    label = key.removeprefix(group.prefix)
    chart = line_chart([Line(label, steps, values)], title=key, zero=group.with_zero)
    trend = number(values[0]) if len(set(values)) == 1 else f"{number(values[0])} &rarr; {number(values[-1])}"
    caption = f'<span class="now">{trend}</span><b>{escape(_unsnake(label))}</b>'
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def phases_section(run: Run) -> str:
    """Show mean seconds of the finest phases; a phase that contains others is left out of the bar."""
    names = [key.removeprefix("time/").removesuffix("_s") for key in run.metric_keys("time/")]
    leaves = [
        name
        for name in names
        if name not in ("iteration", "between") and not any(other.startswith(name + "/") for other in names)
    ]
    means = {name: _mean(run.series(f"time/{name}_s")[1]) for name in leaves}
    ranked = sorted(((name, value) for name, value in means.items() if value > 0), key=lambda item: -item[1])
    if not ranked:
        return ""
    if len(ranked) > MAX_PHASES:
        rest = sum(value for _, value in ranked[MAX_PHASES - 1 :])
        ranked = [*ranked[: MAX_PHASES - 1], ("all others", rest)]
    total = sum(value for _, value in ranked)
    rows = "".join(
        f'<tr><td><span class="swatch fill-{index % 8 + 1}"></span>{escape(_unsnake(name))}</td>'
        f"<td>{number(value)}</td><td>{100 * value / total:.0f}&thinsp;%</td></tr>"
        for index, (name, value) in enumerate(ranked)
    )
    return f"""<section id="time"><h2>Where the time went</h2><p>Mean of an iteration: {number(total)} seconds.</p>
{stacked_bar(ranked)}<table><thead><tr><th>phase</th><th>seconds per iteration</th><th>share</th></tr></thead>
<tbody>{rows}</tbody></table></section>"""


def _has_children(name: str, names: Iterable[str]) -> bool:
    return any(other.startswith((name + "/", name + "_")) for other in names)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0


def _unsnake(name: str) -> str:
    return name.replace("_", " ").replace("/", " / ")
