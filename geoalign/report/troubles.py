"""What went wrong in a run: failures, lost cameras, saturation, skipped updates and numbers out of their range."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Literal

from geoalign.report.ranges import section_of
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number

Kind = Literal["count", "running", "share", "value"]
"""How iterations add up: counts are summed; running counts and values say their largest; shares their mean."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is looked at.

    Attributes:
        keys: pattern that a metric's whole name fits; its first group, if any, names the part in ``title``.
        title: what is counted, with ``{}`` for that part.
        kind: how iterations add up.
        bound: a value above it, in one iteration, is out of range.
        advice: what to look at then.
    """

    keys: str
    title: str
    kind: Kind
    bound: Callable[[RunRecord], float]
    advice: str


def _above(bound: float) -> Callable[[RunRecord], float]:
    return lambda run: bound


def _setting(key: str, default: float, factor: float = 1.0) -> Callable[[RunRecord], float]:
    def bound(run: RunRecord) -> float:
        value = run.setting(key)
        return factor * float(value if isinstance(value, int | float) else default)

    return bound


CHECKS = (
    Check("reward/lost_fraction", "samples in which no camera could be read", "share", _above(0),
          "The policy breaks its videos, or the evaluator does not know such scenes; look at the films."),
    Check("advantage/lost_groups", "groups of which every camera was lost", "count", _above(0),
          "Such a group teaches nothing; look at its condition."),
    Check("reward/saturated_fraction", "frames whose position error reaches the bound of the reward", "share",
          _above(0.01), "Cameras are misread, or the reward's translation_bound is too small."),
    Check("policy/skipped_updates", "updates left out because the gradient was not finite", "count", _above(0),
          "NaN in the policy: lower the rate, or look for the input that causes it."),
    Check(r"failures/([^/]+)", "samples that {} could not score", "count", _above(0),
          "They are masked out, never scored 0; the log names the cause."),
    Check("reward/invalid_fraction", "samples masked out", "share", _setting("failures.max_invalid_fraction", 0.25, 0),
          "Above failures.max_invalid_fraction the run stops."),
    Check(r"failures/([^/]+)/retries", "calls of {} that were repeated", "running", _above(0), "The log says why."),
    Check(r"failures/([^/]+)/timeouts", "calls of {} that came too late", "running", _above(0), "The log says why."),
    Check(r"failures/([^/]+)/errors", "calls of {} that raised", "running", _above(0), "The log says why."),
    Check("data/bad_clips", "clips that cannot be used", "running", _above(0),
          "geoalign data check lists them with their cause."),
    Check("parity/log_prob_diff_max", "largest difference of log-probability between rollout and learner", "value",
          _setting("train.max_log_prob_diff", 1e-6),
          "The two do not run the same kernels, dtype or batch shape."),
    Check(r"advantage/([^/]+)/zero_variance", "groups whose members all have the same {}", "count",
          _setting("groups.conditions", 1.0, 0.5), "Most groups teach nothing of it: saturated, or too little noise."),
    Check("advantage/clip_fraction", "advantages at the clip", "share", _above(0.1), "A reward has outliers."),
    Check(r"policy/clip_fraction_(high|low)", "pairs whose gradient the {} clip removed", "share", _above(0.5),
          "Most of the work is thrown away: fewer updates per rollout, or a lower rate."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """A check on one metric of a run: its values by iteration, and whether any is out of range."""

    check: Check
    key: str
    steps: list[float]
    values: list[float]
    bound: float

    @property
    def out_of_range(self) -> bool:
        """Whether one iteration is above the bound."""
        return max(self.values) > self.bound

    @property
    def title(self) -> str:
        """What was counted."""
        match = re.fullmatch(self.check.keys, self.key)
        part = match.group(1) if match and match.groups() else ""
        return self.check.title.format(part.replace("_", " "))

    @property
    def amount(self) -> str:
        """The iterations together, in the way of the kind."""
        of = {"share": statistics.fmean, "count": sum}.get(self.check.kind, max)
        return self._text(of(self.values))

    @property
    def where(self) -> str:
        """How many iterations are out of range, and the worst of them."""
        above = sum(value > self.bound for value in self.values)
        worst = max(range(len(self.values)), key=self.values.__getitem__)
        most = self._text(self.values[worst])
        return f"in {above} of {len(self.values)} iterations, at most {most} (iteration {self.steps[worst]:g})"

    def _text(self, value: float) -> str:
        if self.check.kind == "share":
            return f"{number(100 * value, 2)} %"
        return number(value) if self.check.kind == "value" else f"{value:g}"


def findings(run: RunRecord) -> Iterator[Finding]:
    """Every check that the run has numbers for."""
    keys = run.metric_keys("")
    for check in CHECKS:
        for key in (key for key in keys if re.fullmatch(check.keys, key)):
            steps, values = run.series(key)
            if values:
                yield Finding(check, key, steps, values, check.bound(run))


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
        f"<li><b>{finding.amount} {escape(finding.title)}</b>, {escape(finding.where)}. {escape(finding.check.advice)} "
        f"<small><code>{escape(finding.key)}</code>, {escape(section_of(finding.key))}</small></li>"
        for finding in bad
    ]
    told = (
        f'<ul class="troubles">{"".join(listed)}</ul><p class="note">What each number means and what to do: '
        "docs/troubleshooting.md and docs/metrics.md.</p>"
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
