"""What went wrong in a run: failures, lost cameras, saturation, skipped updates and numbers out of their range."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from geoalign.report.ranges import PAGE, RANGES, Range
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number


@dataclass(frozen=True, slots=True)
class Finding:
    """One metric of a run against its range: the values by iteration, and whether they are outside.

    Attributes:
        range: what the metric usually is.
        key: the metric's name.
        steps, values: iterations and what they wrote, or the share of ``range.over``.
        bound: of this run.
    """

    range: Range
    key: str
    steps: list[float]
    values: list[float]
    bound: float

    @property
    def out_of_range(self) -> bool:
        """Whether one iteration, or the mean of a level, is outside."""
        return self._outside(statistics.fmean(self.values) if self.range.kind == "level" else self._worst)

    @property
    def title(self) -> str:
        """What was counted."""
        match = re.fullmatch(self.range.metric, self.key)
        part = match.group(1) if match and match.groups() else ""
        return self.range.title.format(part.replace("_", " "))

    @property
    def amount(self) -> str:
        """The iterations together, in the way of the kind."""
        if self.range.kind in ("share", "level"):
            return self._text(statistics.fmean(self.values))
        return self._text(sum(self.values) if self.range.kind == "count" else self._worst)

    @property
    def where(self) -> str:
        """How many iterations are out of range, and the worst of them."""
        outside = sum(map(self._outside, self.values))
        most = f"at {'most' if self.range.side == 'above' else 'least'} {self._text(self._worst)}"
        worst = self.steps[self.values.index(self._worst)]
        return f"in {outside} of {len(self.values)} iterations, {most} (iteration {worst:g})"

    def _outside(self, value: float) -> bool:
        return value > self.bound if self.range.side == "above" else value < self.bound

    @property
    def _worst(self) -> float:
        return (max if self.range.side == "above" else min)(self.values)

    def _text(self, value: float) -> str:
        if self.range.kind == "share" or self.range.over:
            return f"{number(100 * value, 2)} %"
        return f"{value:g}" if self.range.kind in ("count", "running") else number(value)


def findings(run: RunRecord) -> Iterator[Finding]:
    """Every range that the run has numbers for.

    Of a level the run's first iteration is left out where there are others: set-up and compilation fall into it.
    """
    keys = run.metric_keys("")
    for known in RANGES:
        for key in (key for key in keys if re.fullmatch(known.metric, key)):
            steps, values = run.series(key)
            if known.over:
                whole = dict(zip(*run.series(known.over), strict=True))
                shares = [(s, v / whole[s]) for s, v in zip(steps, values, strict=True) if whole.get(s, 0) > 0]
                steps, values = [s for s, _ in shares], [v for _, v in shares]
            if known.kind == "level" and len(values) > 1:
                steps, values = steps[1:], values[1:]
            if values:
                yield Finding(known, key, steps, values, known.bound(run))


def _link(known: Range) -> str:
    """The section that helps, as markup: a link where the docs lie beside the package, in a source tree."""
    page, text = Path(__file__).parents[2] / PAGE, escape(known.link)
    return f'<a href="{escape(page.as_uri())}#{known.anchor}">{text}</a>' if page.is_file() else text


def fallback(run: RunRecord) -> str:
    """A sentence on the iterations that an audit left without the approximations of the run; empty without any."""
    flags = run.series("fidelity/exact_tails")[1]
    if not any(flags):
        return ""
    return (
        f" An audit found the approximate steps of this run bad: {sum(flags):g} of {len(flags)} iterations took exact "
        "ones."
    )


def troubles_section(run: RunRecord, worse: list[str]) -> str:
    """What is out of range first, then everything that was looked at; nothing for a run without metrics.

    Args:
        worse: held-out numbers that training made worse, as sentences.
    """
    found = list(findings(run))
    if not found and not worse:
        return ""
    bad = [finding for finding in found if finding.out_of_range]
    listed = [f"<li><b>{escape(text)}</b></li>" for text in worse]
    listed += [
        f"<li><b>{finding.amount} {escape(finding.title)}</b>, {escape(finding.where)}. {escape(finding.range.advice)} "
        f"<small><code>{escape(finding.key)}</code>, {_link(finding.range)}</small></li>"
        for finding in bad
    ]
    told = (
        f'<ul class="troubles">{"".join(listed)}</ul><p class="note">What each number means and what to do: '
        f"{PAGE} and docs/metrics.md.</p>"
        if listed
        else f"<p>Nothing is out of its range in the {len(run.metrics)} iterations that were written.</p>"
    )
    rows = "".join(
        f"<tr><td>{escape(finding.title)}</td>"
        f'<td class="{"bad" if finding.out_of_range else "even"}">{finding.amount}</td></tr>'
        for finding in found
    )
    table = (
        f"<details><summary>All {len(found)} things looked at</summary><table><tbody>{rows}</tbody></table></details>"
        if found
        else ""
    )
    return f'<section id="troubles"><h2>What went wrong</h2>{told}{table}</section>'
