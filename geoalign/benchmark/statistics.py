"""Means over cases, intervals and tests over clips: the cases of one clip are no independent draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_SEED = 0
"""Of the resampling: a table made twice is the same table."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over cases.

    Attributes:
        mean: over all cases where the number is defined; NaN if there is none.
        low, high: bootstrap interval over clips; NaN with fewer than two clips.
        cases, clips: how many stand behind it.
    """

    mean: float
    low: float
    high: float
    cases: int
    clips: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A method against the base, on the cases that both have.

    Attributes:
        estimate: of method minus base.
        p: of the Wilcoxon signed-rank test that the clips' mean differences lie about 0, two-sided; NaN where every
            difference is 0 or fewer than two clips are left.
        lost: cases that are missing from the pairs, because one of both failed, or both.
    """

    estimate: Estimate
    p: float
    lost: int


Values = Mapping[tuple[str, str], float]
"""One number by (clip, case name); NaN of a case that failed."""


def estimate(values: Values, resamples: int) -> Estimate:
    """Mean over cases with its interval by resampling clips."""
    defined = _defined(values)
    sums, counts = _by_clip(defined)
    if not len(counts):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean = float(sums.sum() / counts.sum())
    low, high = _interval(sums, counts, resamples)
    return Estimate(mean, low, high, int(counts.sum()), len(counts))


def difference(method: Values, base: Values, resamples: int) -> Difference:
    """Paired: a case that one of both lacks leaves the comparison, and is counted."""
    ours, theirs = _defined(method), _defined(base)
    both = ours.keys() & theirs.keys()
    deltas = {key: ours[key] - theirs[key] for key in sorted(both)}
    sums, counts = _by_clip(deltas)
    lost = len((method.keys() | base.keys()) - both)
    return Difference(estimate(deltas, resamples), paired_p(sums / counts) if len(counts) else math.nan, lost)


def paired_p(differences: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; NaN for fewer than two differences, or none other than 0."""
    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2 or not found.any():
        return math.nan
    return float(stats.wilcoxon(found).pvalue)


def _interval(sums: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], resamples: int) -> tuple[float, float]:
    if len(counts) < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        (sums, counts), _ratio, paired=True, vectorized=True, n_resamples=resamples, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _ratio(sums: Any, counts: Any, axis: int = -1) -> Any:
    """Mean over the cases of the clips drawn; clips with more cases weigh more, as they do in the mean itself."""
    return sums.sum(axis) / counts.sum(axis)


def _defined(values: Values) -> dict[tuple[str, str], float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _by_clip(values: Values) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sum and number of the values of each clip, by clip name."""
    clips = sorted({clip for clip, _ in values})
    grouped = [[value for (clip, _), value in values.items() if clip == name] for name in clips]
    return np.array([sum(group) for group in grouped]), np.array([len(group) for group in grouped])
