"""Usual ranges of a run's metrics, and the section of docs/troubleshooting.md for a value outside.

One home for whoever judges numbers: the report links to these sections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

PAGE = "docs/troubleshooting.md"
_ROUNDING = 1e-5
"""float32 means over a window's elements: a ratio that is 1 by construction is at most this far from it."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a metric usually is.

    Attributes:
        metric: its name in docs/metrics.md; ``*`` stands for a reward key or scorer.
        low, high: bounds, both inclusive.
        anchor: the section that says what to do outside.
        says: what it means to be outside, in a few words.
        over: another metric that the value is a share of.
        one_update: holds only with ``optim.updates_per_rollout`` 1.
    """

    metric: str
    low: float
    high: float
    anchor: str
    says: str
    over: str = ""
    one_update: bool = False


RANGES = (
    Range("parity/log_prob_diff_max", 0.0, 1e-6, "the-ratio-is-not-1", "rollout and learner disagree"),
    Range("policy/ratio_min", 1 - _ROUNDING, math.inf, "the-ratio-is-not-1", "a ratio below 1", one_update=True),
    Range("policy/ratio_max", 0.0, 1 + _ROUNDING, "the-ratio-is-not-1", "a ratio above 1", one_update=True),
    Range("policy/skipped_updates", 0.0, 0.0, "nan-and-skipped-updates", "an update was left out"),
    Range("policy/grad_norm", 1e-12, math.inf, "the-reward-is-flat", "no gradient"),
    Range("policy/clip_fraction_*", 0.0, 0.5, "most-updates-are-clipped", "most pairs are clipped"),
    Range("advantage/*/sigma_median", 1e-8, math.inf, "groups-without-variance", "most groups do not differ"),
    Range("advantage/*/sigma_max_over_median", 0.0, 10.0, "groups-without-variance", "one group rules the rest"),
    Range("advantage/clip_fraction", 0.0, 0.1, "most-updates-are-clipped", "outliers in a reward"),
    Range("advantage/lost_groups", 0.0, 0.0, "cameras-are-lost", "whole groups without a camera"),
    Range("reward/lost_fraction", 0.0, 0.1, "cameras-are-lost", "no camera in many videos"),
    Range("reward/saturated_fraction", 0.0, 0.01, "errors-at-the-bound", "errors at the reward's bound"),
    Range("reward/invalid_fraction", 0.0, 0.0, "samples-fail", "samples that could not be scored"),
    Range("failures/*/timeouts", 0.0, 0.0, "samples-fail", "a scorer came too late"),
    Range("failures/*/errors", 0.0, 0.0, "samples-fail", "a scorer raised"),
    Range("time/rollout/decode_s", 0.0, 0.25, "decoding-and-scoring-are-slow", "decoding", over="time/iteration_s"),
    Range("time/data_s", 0.0, 0.05, "the-run-waits-for-data", "waiting for clips", over="time/iteration_s"),
    Range("time/between_s", 0.0, 0.25, "time-between-iterations", "time between iterations", over="time/iteration_s"),
    Range("time/other_s", 0.0, 0.25, "time-between-iterations", "time in no phase", over="time/iteration_s"),
)
"""Shares of time are those above which the fix is worth the work; the demo, whose iterations take a second, may exceed
them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A metric outside its range.

    Attributes:
        metric: its name.
        value: as it is, or its share.
        range: what it should be, and where to read on.
    """

    metric: str
    value: float
    range: Range

    @property
    def link(self) -> str:
        """Page and section."""
        return f"{PAGE}#{self.range.anchor}"


def findings(numbers: Mapping[str, float | None], *, updates_per_rollout: int = 1) -> list[Finding]:
    """Metrics of an iteration, or means over several, that are outside their range; NaN and None are.

    Args:
        numbers: by name; what is not there is not judged.
        updates_per_rollout: of the run's settings.
    """
    found = []
    for known in RANGES:
        if known.one_update and updates_per_rollout > 1:
            continue
        for name in sorted(name for name in numbers if fnmatchcase(name, known.metric)):
            value = _number(numbers[name])
            if known.over:
                whole = _number(numbers.get(known.over))
                value = value / whole if whole > 0 else math.nan
            if not known.low <= value <= known.high and not (known.over and math.isnan(value)):
                found.append(Finding(name, value, known))
    return found


def section_of(metric: str) -> str:
    """Page and section of the docs on ``metric``; the page alone for one that has no range."""
    anchor = next((f"#{known.anchor}" for known in RANGES if fnmatchcase(metric, known.metric)), "")
    return f"{PAGE}{anchor}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
