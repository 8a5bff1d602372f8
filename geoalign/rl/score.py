"""Scoring a batch of videos with all rewards, so that one failing scorer never biases the others (rule R4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.placement import invalid_output
from geoalign.types import RetakeBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of R videos.

    Attributes:
        scores: reward key -> ``[R]`` float32, 0 where invalid.
        valid: ``[R]`` bool, False if any scorer failed on the sample (infrastructure failures only).
        parts: physical quantities for people, ``[R]`` each.
        diagnostics: further named ``[R]`` values.
        failures: scorer -> number of samples it failed on.
        seconds: scorer -> seconds.
    """

    scores: Mapping[str, Tensor]
    valid: Tensor
    parts: Mapping[str, Tensor]
    diagnostics: Mapping[str, Tensor]
    failures: Mapping[str, int]
    seconds: Mapping[str, float]


def score_videos(
    rewards: Mapping[str, Reward], videos: Tensor, batch: RetakeBatch, usable: Tensor | None = None
) -> Scores:
    """Score ``videos`` ``[R, F, 3, H, W]`` of R conditions.

    A scorer that raises makes its samples invalid; it is logged with its cause and counted. (Rewards built with a
    ``FailureConfig`` guard themselves: they retry, then single out the bad sample.) Usage errors (a wrong set-up, not a
    bad sample) are raised.

    Args:
        rewards: scorers by name.
        videos: generated videos in [-1, 1].
        batch: their conditions, one per video.
        usable: ``[R]`` bool, False for samples that already failed (NaN latents); they stay invalid.
    """
    device = videos.device
    valid = torch.ones(len(batch), dtype=torch.bool, device=device) if usable is None else usable.to(device, copy=True)
    scores: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    diagnostics: dict[str, Tensor] = {}
    failures: dict[str, int] = {"policy": int((~valid).sum())}
    seconds: dict[str, float] = {}
    for name, reward in rewards.items():
        began = time.perf_counter()
        output = _on(device, _call(name, reward, videos, batch))
        seconds[name] = time.perf_counter() - began
        failures[name] = int((~output.valid & valid).sum())
        valid &= output.valid
        scores |= output.scores
        parts |= output.parts
        diagnostics |= {f"{name}/{key}": value for key, value in output.diagnostics.items()}
    scores = {key: torch.where(valid, value, torch.zeros_like(value)) for key, value in scores.items()}
    return Scores(scores, valid, parts, diagnostics, failures, seconds)


def _call(name: str, reward: Reward, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
    try:
        return reward(videos, batch).masked_by_finite()
    except UsageError:
        raise
    except Exception as error:
        logger.warning("reward %s failed on %d videos: %s: %s", name, len(batch), type(error).__name__, error)
        return invalid_output(reward.keys, len(batch), videos.device)


def _on(device: torch.device, output: RewardOutput) -> RewardOutput:
    """Scorers may answer from another device than that of the videos (optical flow runs on the CPU)."""
    groups = (output.scores, output.parts, output.diagnostics)
    scores, parts, diagnostics = ({key: value.to(device) for key, value in group.items()} for group in groups)
    return RewardOutput(scores, output.valid.to(device), parts, diagnostics)
