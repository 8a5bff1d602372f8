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
        error: [n] float64 mean square difference from the videos beside them; 0 without any, NaN where one is not
            finite.
        neighbours: [n] float64 mean square difference of a video from the one before it; NaN for the first, and where
            one is not finite.
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
    """Score the videos of ``latents``. Scorers see zeros in place of one that is not finite, which is invalid.

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
    usable = torch.isfinite(latents).flatten(1).all(1)  # [n]
    shown = torch.where(usable.view(-1, 1, 1, 1, 1), latents, torch.zeros_like(latents))

    def decode(rows: Tensor, conditions: RetakeBatch) -> Tensor:
        source = conditions.source.video
        video = policy.decode(shown[rows].float(), source)
        other = video if beside is None else policy.decode(beside[rows].float(), source)
        errors.append(mean_square(other, video).cpu())
        before = torch.cat([last[0] if last else torch.full_like(video[:1], torch.nan), video[:-1]])
        apart.append(mean_square(video, before).cpu())
        last[:] = [video[-1:]]
        return video

    scored = decode_and_score(rewards, decode, batch, owner, chunk=chunk)
    finite = usable.cpu()
    both = finite & finite.roll(1)  # the first has none before it
    error, neighbours = torch.cat(errors).where(finite, torch.nan), torch.cat(apart).where(both, torch.nan)
    return Judged(merged(scored, usable), error, neighbours)
