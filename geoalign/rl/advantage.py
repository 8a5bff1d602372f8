"""Group-relative advantages of several rewards (eq. 5): normalise each reward key, then combine, then clip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.config.flow import AdvantageConfig
from geoalign.errors import ConfigError, UsageError

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Deviation over largest magnitude up to which a group's rewards are equal: they are sums in float32."""
LEAST_MEDIAN = 1e-8
"""What the largest deviation is compared with where most groups have none."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """Advantages of B samples.

    Attributes:
        values: [B] float32, clipped weighted sum; 0 for invalid samples. Lost samples get the lowest value of their
            group's readable members, at most -1 (within the clip); 0 in a group without readable members.
        per_key: [B] float32 per reward key, normalised, before weight and clip; 0 for invalid and lost samples.
        metrics: ``<key>/mean``, ``<key>/sigma_max``, ``<key>/sigma_median``, ``<key>/sigma_max_over_median``,
            ``<key>/zero_variance`` (number of groups), ``<key>/denominator`` (mean over groups),
            ``clip_fraction``, ``valid_fraction``, ``lost_groups`` (number of groups whose valid members are all lost).
    """

    values: Tensor
    per_key: Mapping[str, Tensor]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Readable members by group: ``index`` [B] in 0..N-1, ``read`` [B] float64 mask, ``count`` [N]."""

    index: Tensor
    read: Tensor
    count: Tensor

    @staticmethod
    def of(index: Tensor, members: Tensor) -> _Groups:
        """From the bool mask [B] of the members that count."""
        read = members.double()
        count = read.new_zeros(int(index.max()) + 1).index_add_(0, index, read)
        return _Groups(index, read, count)

    def mean(self, values: Tensor) -> Tensor:
        """[N] mean over the readable members; 0 where there are none."""
        total = torch.zeros_like(self.count).index_add_(0, self.index, values * self.read)
        return total / self.count.clamp_min(1.0)


def group_advantage(
    scores: Mapping[str, Tensor],
    valid: Tensor,
    group_ids: Tensor,
    config: AdvantageConfig,
    lost: Tensor | None = None,
) -> Advantage:
    """Advantages from the scores of one iteration, of all ranks together.

    Invalid samples leave mean, deviation and loss. Lost samples (content that no reward can read) leave mean and
    deviation, so that they change no other advantage, and get the lowest one of their group (rule R4). Deviations are
    population deviations (ddof 0). A group whose rewards are equal up to rounding has advantage 0. All arithmetic is
    float64. Every rank is given all scores and finds the same advantages, whatever the layout.

    Args:
        scores: reward key -> [B], higher is better; entries of invalid or lost samples are ignored, NaN included.
        valid: [B] bool.
        group_ids: [B] integers; all members of a group must be present.
        config: denominator, floors, weights, clip.
        lost: [B] bool, ignored for invalid samples; None: no sample is lost.

    Raises:
        ConfigError: a weight or floor names a reward that does not exist.
        UsageError: shapes differ, or a score that counts is not finite.
    """
    lost = torch.zeros_like(valid) if lost is None else valid & lost
    read = valid & ~lost
    _check(scores, read, group_ids, config)
    groups = _Groups.of(torch.unique(group_ids, return_inverse=True)[1], read)
    per_key: dict[str, Tensor] = {}
    metrics: dict[str, float] = {"valid_fraction": float(valid.double().mean())}
    total = torch.zeros_like(groups.read)
    for key, score in scores.items():
        values = torch.where(read, score.double(), 0.0)
        normalised, key_metrics = _normalise(values, groups, config, key)
        total += config.weights.get(key, 1.0) * normalised
        per_key[key] = normalised.float()
        metrics |= {f"{key}/{name}": number for name, number in key_metrics.items()}
    bound = float("inf") if config.clip is None else config.clip
    metrics["clip_fraction"] = float((total.abs() > bound).double().mean())
    metrics["lost_groups"] = float(((groups.count == 0) & (_Groups.of(groups.index, lost).count > 0)).sum())
    total = torch.where(lost, _lowest(total, groups)[groups.index], total)
    return Advantage(total.clamp(-bound, bound).float(), per_key, metrics)


def check_named(config: AdvantageConfig, keys: Iterable[str]) -> None:
    """Raise ConfigError for a weight or a floor of something that is none of the ``keys`` which the rewards give."""
    known = set(keys)
    for field, named in (("weights", config.weights), ("floors", config.floors)):
        if unknown := sorted(set(named) - known):
            raise ConfigError(
                f"advantage.{field} names {', '.join(unknown)}, but the rewards give {', '.join(sorted(known))}; "
                "correct the name, or keep the reward that gives it: with weight 0 it is measured and teaches nothing"
            )


def _lowest(total: Tensor, groups: _Groups) -> Tensor:
    """[N] what a lost member gets: the lowest sum of the readable ones, at most -1; 0 where there are none."""
    readable = torch.where(groups.read > 0, total, 0.0)
    lowest = readable.new_full(groups.count.shape, -1.0).scatter_reduce(0, groups.index, readable, "amin")
    return torch.where(groups.count > 0, lowest, 0.0)


def _normalise(values: Tensor, groups: _Groups, config: AdvantageConfig, key: str) -> tuple[Tensor, dict[str, float]]:
    centred = (values - groups.mean(values)[groups.index]) * groups.read
    std = groups.mean(centred.square()).sqrt()
    largest_value = torch.zeros_like(std).scatter_reduce(0, groups.index, values.abs(), "amax")
    std = torch.where(std > ROUNDING * largest_value, std, 0.0)
    centred = torch.where(std[groups.index] > 0, centred, 0.0)  # or a small denominator would blow rounding up
    comparable = std[groups.count >= 2]  # a single member has no deviation and must not enter median or quantile
    denominator = _denominator(values, std, comparable, groups, config, key)
    largest, median = (float(torch.quantile(comparable, q)) if comparable.numel() else 0.0 for q in (1.0, 0.5))
    metrics = {
        "mean": float(values.sum() / groups.read.sum().clamp_min(1.0)),
        "sigma_max": largest,
        "sigma_median": median,
        "sigma_max_over_median": largest / max(median, LEAST_MEDIAN),
        "denominator": float(denominator.mean()),
        "zero_variance": float((comparable == 0).sum()),
    }
    return centred / denominator[groups.index], metrics


def _denominator(
    values: Tensor,
    std: Tensor,
    comparable: Tensor,
    groups: _Groups,
    config: AdvantageConfig,
    key: str,
) -> Tensor:
    """[N] denominators, one per group."""
    floor = config.floor_of(key)
    match config.std:
        case "group":
            return std.clamp_min(floor)
        case "batch_max":
            shared = torch.quantile(comparable, config.quantile) if comparable.numel() else std.new_zeros(())
        case "batch_rms":
            shared = (comparable.square().sum() / max(comparable.numel(), 1)).sqrt()
        case "global":
            size = groups.read.sum().clamp_min(1.0)
            deviation = (values - values.sum() / size) * groups.read  # a second pass: sum x^2 - n mean^2 would cancel
            shared = (deviation.square().sum() / size).sqrt()
    return shared.clamp_min(floor).expand(std.shape)


def _check(scores: Mapping[str, Tensor], read: Tensor, group_ids: Tensor, config: AdvantageConfig) -> None:
    check_named(config, scores)
    for key, score in scores.items():
        if score.shape != read.shape or group_ids.shape != read.shape or read.dim() != 1:
            raise UsageError(
                f"score {key!r} {list(score.shape)}, masks {list(read.shape)} and group_ids {list(group_ids.shape)} "
                "must all be [B]"
            )
        if not bool(torch.isfinite(score[read]).all()):
            raise UsageError(f"score {key!r} is not finite for a sample that counts; mark such samples invalid")
