"""Usual ranges of a run's metrics: the one table from which a report's troubles and links into the docs come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from geoalign.report.run_folder import RunRecord

PAGE = "docs/troubleshooting.md"
_ROUNDING = 1e-5
"""float32 means over a window's elements: a ratio that is 1 by construction is at most this far from it."""

Kind = Literal["count", "running", "share", "value", "level"]
"""How iterations add up, and which of them is judged: counts are summed; running counts and values say their worst;
shares their mean; one iteration outside is enough. A level says its mean, which alone is judged."""
Bound = Callable[[RunRecord], float]


@dataclass(frozen=True, slots=True)
class Range:
    """What a metric usually is.

    Attributes:
        metric: pattern of its whole name (docs/metrics.md); the first group, if any, names the part in ``title``.
        title: what is counted, with ``{}`` for that part.
        kind: how iterations add up.
        bound: the last value that is in range.
        anchor: the section of :data:`PAGE` that says what to do outside.
        advice: the same in a few words.
        side: on which side of the bound a value is out of range.
        over: another metric, of which the value is a share.
    """

    metric: str
    title: str
    kind: Kind
    bound: Bound
    anchor: str
    advice: str
    side: Literal["above", "below"] = "above"
    over: str = ""

    @property
    def link(self) -> str:
        """Page and section."""
        return f"{PAGE}#{self.anchor}"


def _at(bound: float) -> Bound:
    return lambda run: bound


def _setting(key: str, default: float, factor: float = 1.0) -> Bound:
    def bound(run: RunRecord) -> float:
        value = run.setting(key)
        return factor * float(value if isinstance(value, int | float) else default)

    return bound


def _one_update(bound: float, otherwise: float) -> Bound:
    """``bound`` for runs whose ratio is 1 by construction."""
    return lambda run: bound if _setting("optim.updates_per_rollout", 1)(run) == 1 else otherwise


_ONE = "With one update per rollout it is 1: rollout and learner do not run the same thing."

RANGES = (
    Range("reward/lost_fraction", "samples in which no camera could be read", "share", _at(0), "cameras-are-lost",
          "The policy breaks its videos, or the evaluator does not know such scenes; look at the films."),
    Range("advantage/lost_groups", "groups of which every camera was lost", "count", _at(0), "cameras-are-lost",
          "Such a group teaches nothing; look at its condition."),
    Range("reward/saturated_fraction", "frames whose position error reaches the bound of the reward", "share",
          _at(0.01), "errors-at-the-bound", "Cameras are misread, or the reward's translation_bound is too small."),
    Range("fidelity/bad", "numbers of audits beyond their bounds, or missing", "count", _at(0), "an-audit-is-bad",
          "The approximate steps do not keep what a group teaches: take a finer setting."),
    Range("fidelity/spearman", "smallest rank correlation of the advantages under exact and approximate steps", "value",
          _setting("ode.audit_spearman", -1), "an-audit-is-bad", "The approximate steps reorder what they sample.",
          "below"),
    Range("fidelity/margin", "dB that approximate videos are nearer to the exact ones than samples to each other",
          "value", _setting("ode.audit_margin", -math.inf), "an-audit-is-bad",
          "The approximate steps show other videos than the exact ones.", "below"),
    Range("fidelity/exact_tails", "iterations with exact steps after the window, because an audit was bad", "count",
          _at(0), "an-audit-is-bad", "They cost what the approximation was to save."),
    Range("policy/skipped_updates", "updates left out because the gradient was not finite", "count", _at(0),
          "nan-and-skipped-updates", "NaN in the policy: lower the rate, or look for the input that causes it."),
    Range("failures/policy", "samples whose latents are not finite", "count", _at(0), "nan-and-skipped-updates",
          "They are masked out; the policy makes NaN: lower the rate, or look at the step that causes it."),
    Range(r"failures/(?!policy$)([^/]+)", "samples that {} could not score", "count", _at(0), "samples-fail",
          "They are masked out, never scored 0; the log names the cause."),
    Range("reward/invalid_fraction", "samples masked out", "share", _at(0), "samples-fail",
          "Above failures.max_invalid_fraction the run stops."),
    Range(r"failures/([^/]+)/retries", "calls of {} that were repeated", "running", _at(0), "samples-fail",
          "The log says why."),
    Range(r"failures/([^/]+)/timeouts", "calls of {} that came too late", "running", _at(0), "samples-fail",
          "The log says why."),
    Range(r"failures/([^/]+)/errors", "calls of {} that raised", "running", _at(0), "samples-fail",
          "The log says why."),
    Range("data/bad_clips", "clips that cannot be used", "running", _at(0), "samples-fail",
          "geoalign data check lists them with their cause."),
    Range("parity/log_prob_diff_max", "largest difference of log-probability between rollout and learner", "value",
          _setting("train.max_log_prob_diff", 1e-6), "the-ratio-is-not-1",
          "The two do not run the same kernels, dtype or batch shape."),
    Range("policy/ratio_max", "largest probability ratio", "value", _one_update(1 + _ROUNDING, math.inf),
          "the-ratio-is-not-1", _ONE),
    Range("policy/ratio_min", "smallest probability ratio", "value", _one_update(1 - _ROUNDING, 0),
          "the-ratio-is-not-1", _ONE, "below"),
    Range("policy/grad_norm", "smallest norm of the gradient", "value", _at(1e-12), "the-reward-is-flat",
          "Without a gradient nothing is learned.", "below"),
    Range(r"advantage/([^/]+)/zero_variance", "groups whose members all have the same {}", "count",
          _setting("groups.conditions", 1.0, 0.5), "groups-without-variance",
          "Most groups teach nothing of it: saturated, or too little noise."),
    Range(r"advantage/([^/]+)/sigma_max_over_median", "largest over median deviation of {}", "level", _at(10),
          "groups-without-variance", "One group rules what the others are divided by."),
    Range("advantage/clip_fraction", "advantages at the clip", "share", _at(0.1), "most-updates-are-clipped",
          "A reward has outliers."),
    Range(r"policy/clip_fraction_(high|low)", "pairs whose gradient the {} clip removed", "share", _at(0.5),
          "most-updates-are-clipped", "Most of the work is thrown away: fewer updates per rollout, or a lower rate."),
    Range("time/rollout/decode_s", "of an iteration's time go to decoding", "level", _at(0.25),
          "decoding-and-scoring-are-slow", "Score beside it, in smaller chunks.", over="time/iteration_s"),
    Range("time/data_s", "of an iteration's time are spent waiting for clips", "level", _at(0.05),
          "the-run-waits-for-data", "Prepare them, or take another reader.", over="time/iteration_s"),
    Range("time/between_s", "of an iteration's time pass before the next one", "level", _at(0.25),
          "time-between-iterations", "Evaluations, checkpoints, a slow disk.", over="time/iteration_s"),
    Range("time/other_s", "of an iteration's time are in no phase", "level", _at(0.25),
          "time-between-iterations", "Idle time, or host work without a name.", over="time/iteration_s"),
)  # fmt: skip
"""Shares of time are those above which a fix is worth the work."""
