"""How well an approximate tail keeps what a group teaches: the order, the signs and the level of its members' scores.

The probability ratio cannot see this: it is that of the window's transitions, whatever video they lead to. So exact and
approximate tail start from the same window states, and what the trainer makes of both is compared inside each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_GROUPS = 16
"""Below this many groups a tenth percentile says nothing, so nothing is accepted."""
LEAST_MEMBERS = 3
"""A rank correlation of two members is plus or minus 1 whatever happened."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one tail made of the G members of a group.

    Attributes:
        advantage: [G] total advantage, as the trainer computes it.
        scores: reward key -> [G].
        valid: [G] bool, no scorer failed.
        lost: [G] bool, no camera could be read.
    """

    advantage: Tensor
    scores: Mapping[str, Tensor]
    valid: Tensor
    lost: Tensor

    def select(self, rows: slice) -> Outcome:
        """Some of the rows, such as one group of several."""
        scores = {key: value[rows] for key, value in self.scores.items()}
        return Outcome(self.advantage[rows], scores, self.valid[rows], self.lost[rows])


@dataclass(frozen=True, slots=True)
class GroupFidelity:
    """One group under two tails; NaN where fewer than three members count or they do not differ under the exact one.

    Attributes:
        spearman, kendall, pearson: correlation of the members' advantages.
        flips: share of members whose advantage changed its sign; ``flips_weighted``: each by its exact magnitude.
        shift: reward key -> change of the mean over members that both tails left readable.
        spread: reward key -> deviation among them under the exact tail.
        psnr: in dB, of the approximate videos against the exact ones, whose range is 2.
        distance: the same between members of the group.
    """

    spearman: float
    kendall: float
    pearson: float
    flips: float
    flips_weighted: float
    shift: Mapping[str, float]
    spread: Mapping[str, float]
    psnr: float
    distance: float

    @property
    def margin(self) -> float:
        """How much nearer, in dB, the approximate videos are to the exact ones than members to each other."""
        return self.psnr - self.distance

    def numbers(self) -> dict[str, float]:
        """What one group says alone; the bias is in deviations of the group."""
        bias = {f"bias_{key}": _ratio(self.shift[key], self.spread[key]) for key in self.shift}
        names = ("spearman", "flips", "flips_weighted", "psnr", "distance", "margin")
        return {name: getattr(self, name) for name in names} | bias


def compare(exact: Outcome, other: Outcome, error: Tensor, distance: float) -> GroupFidelity:
    """The fidelity of one group.

    Args:
        exact, other: under the exact and the approximate tail.
        error: [G] mean square difference of the two videos of each member.
        distance: mean square difference between videos of different members (NaN: not known).
    """
    from scipy.stats import kendalltau, pearsonr, spearmanr

    valid = exact.valid & other.valid
    a, b = (outcome.advantage[valid].double() for outcome in (exact, other))
    read = valid & ~exact.lost & ~other.lost
    flipped, magnitude = (a.sign() != b.sign()).double(), a.abs()
    correlations = [math.nan] * 3
    if _differ(a):  # members that no longer differ are in no order
        told = float(b.std()) > 0
        measures = (spearmanr, kendalltau, pearsonr)
        correlations = [float(measure(a.numpy(), b.numpy())[0]) if told else 0.0 for measure in measures]
    scores = {key: (exact.scores[key][read].double(), other.scores[key][read].double()) for key in exact.scores}
    return GroupFidelity(
        spearman=correlations[0],
        kendall=correlations[1],
        pearson=correlations[2],
        flips=float(flipped.mean()) if len(a) else math.nan,
        flips_weighted=_ratio(float((flipped * magnitude).sum()), float(magnitude.sum())),
        shift={key: float((y - x).mean()) if len(x) else math.nan for key, (x, y) in scores.items()},
        spread={key: float(x.std(correction=0)) if len(x) else math.nan for key, (x, _) in scores.items()},
        psnr=_decibel(float(error[valid].double().mean())) if len(a) else math.nan,
        distance=_decibel(distance),
    )


def told(exact: Outcome, distance: float) -> frozenset[str]:
    """Which of ``spearman``, ``margin`` and biases a group's exact tail defines: NaN there is the other tail's doing.

    A number needs three members that count for it and differ, the margin a ``distance`` (as in :func:`compare`) too.
    """
    read = exact.valid & ~exact.lost
    found = {f"bias_{key}" for key, scores in exact.scores.items() if _differ(scores[read])}
    if _differ(exact.advantage[exact.valid]):
        found |= {"spearman"} if math.isnan(distance) else {"spearman", "margin"}
    return frozenset(found)


def mean_square(first: Tensor, second: Tensor) -> Tensor:
    """[B] mean square difference of videos [B, ...], float64."""
    return (first.double() - second.double()).square().flatten(1).mean(1)


def summary(groups: Sequence[GroupFidelity]) -> dict[str, float]:
    """Over groups: means, the tenth percentile of Spearman, and biases in mean deviations inside groups."""

    def mean(name: str) -> float:
        return _mean([getattr(group, name) for group in groups])

    ranks = torch.tensor([group.spearman for group in groups if not math.isnan(group.spearman)], dtype=torch.float64)
    keys = groups[0].shift
    bias = {key: _ratio(_mean([g.shift[key] for g in groups]), _mean([g.spread[key] for g in groups])) for key in keys}
    return {
        "groups": float(len(ranks)),
        "spearman": mean("spearman"),
        "spearman_p10": float(torch.quantile(ranks, 0.1)) if len(ranks) else math.nan,
        "kendall": mean("kendall"),
        "pearson": mean("pearson"),
        "flips": mean("flips"),
        "flips_weighted": mean("flips_weighted"),
        **{f"bias_{key}": value for key, value in bias.items()},
        "psnr": mean("psnr"),
        "distance": mean("distance"),
    }


def shortfalls(row: Mapping[str, float], cost: float) -> list[str]:
    """What keeps a summary from being accepted; empty if nothing does.

    Args:
        row: from :func:`summary`.
        cost: of the tail, as a share of the exact one's.
    """
    bounds = [
        ("groups", row["groups"] >= LEAST_GROUPS, f">= {LEAST_GROUPS}"),
        ("spearman", row["spearman"] >= 0.95, ">= 0.95"),
        ("spearman_p10", row["spearman_p10"] >= 0.90, ">= 0.90"),
        ("kendall", row["kendall"] >= 0.85, ">= 0.85"),
        ("flips", row["flips"] <= 0.05, "<= 0.05"),
        ("flips_weighted", row["flips_weighted"] <= 0.01, "<= 0.01"),
        *((name, abs(value) <= 0.1, "within 0.1") for name, value in row.items() if name.startswith("bias_")),
        ("psnr", row["psnr"] - row["distance"] >= 15.0, "15 dB above the members' distance"),
        ("pearson", row["pearson"] ** 2 / cost > 1.0, "squared, above the cost"),
    ]
    return [f"{name} {row[name]:.3g} ({wanted})" for name, met, wanted in bounds if not met]


def _differ(values: Tensor) -> bool:
    return len(values) >= LEAST_MEMBERS and float(values.double().std()) > 0


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.nan)


def _decibel(error: float) -> float:
    """Peak signal-to-noise ratio of a mean square error; equal videos count as 1e-12."""
    return 10.0 * math.log10(4.0 / max(error, 1e-12)) if not math.isnan(error) else math.nan
