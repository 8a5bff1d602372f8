"""Decode and score latents beside others of the same samples: what an audit and a fidelity table both do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.base import Reward
from geoalign.rewards.running.turns import decode_and_score
from geoalign.rl.fidelity import mean_square
from geoalign.rl.score import Scores, merged
from geoalign.types import RetakeBatch


@dataclass(frozen=True, slots=True)
class Judged:
    """n videos.

    Attributes:
        scores: of the run's rewards.
        error: [n] float64 mean square difference from the videos beside them; 0 without any.
        neighbours: [n] float64 mean square difference of a video from the one before it; NaN for the first.
    """

    scores: Scores
    error: Tensor
    neighbours: Tensor


def judge(
    policy: RetakePolicy,
    rewards: Mapping[str, Reward],
    latents: Tensor,
    batch: RetakeBatch,
    owner: Tensor,
    *,
    chunk: int | None,
    beside: Tensor | None = None,
) -> Judged:
    """Score the videos of ``latents``.

    Args:
        policy: decodes.
        rewards: scorers by name.
        latents: [n, C, T, h, w].
        batch: conditions.
        owner: [n] int64, the condition of each.
        chunk: videos decoded at a time; None: all.
        beside: latents like ``latents``, whose videos are compared with.
    """
    errors: list[Tensor] = []
    apart: list[Tensor] = []
    last: list[Tensor] = []

    def decode(rows: Tensor, conditions: RetakeBatch) -> Tensor:
        source = conditions.source.video
        video = policy.decode(latents[rows].float(), source)
        other = video if beside is None else policy.decode(beside[rows].float(), source)
        errors.append(mean_square(other, video).cpu())
        before = torch.cat([last[0] if last else torch.full_like(video[:1], torch.nan), video[:-1]])
        apart.append(mean_square(video, before).cpu())
        last[:] = [video[-1:]]
        return video

    scored = decode_and_score(rewards, decode, batch, owner, chunk=chunk)
    usable = torch.isfinite(latents).flatten(1).all(1)
    return Judged(merged(scored, usable), torch.cat(errors), torch.cat(apart))
