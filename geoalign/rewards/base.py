"""What a reward is: videos and their conditions in; scores, a valid mask and named diagnostics out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from geoalign.errors import RewardError
from geoalign.types import RetakeBatch, SourceClip

NO_PLANE = (
    "the {} evaluator needs the ground plane of the source clip, in metres (ground_plane in its camera file); for "
    "clips without one, evaluator mapanything with evaluator_options.checkpoint reads images alone"
)


class ScorerTimeoutError(RewardError):
    """A scorer did not answer in time."""


@dataclass(frozen=True, slots=True)
class PoseEstimate:
    """The camera that an evaluator reads from a video, in metres, relative to frame 0.

    Attributes:
        c2w: ``[B, K, 4, 4]`` float32 camera-to-world of the evaluated frames; frame 0 is the identity.
        frame_indices: ``[K]`` int64, which video frames were evaluated (strictly increasing, starts at 0).
        tracked: ``[B]`` float32 in [0, 1], how much of the picture the estimate explains.
        residual: ``[B]`` float32, photometric or reprojection residual of the estimate (unit named by the evaluator).
        diagnostics: named ``[B]`` tensors (for instance the estimator's metric scale).
    """

    c2w: Tensor
    frame_indices: Tensor
    tracked: Tensor
    residual: Tensor
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class PoseEvaluator(Protocol):
    """Reads metric camera poses from a video. It is given the source, never the target trajectory."""

    name: str

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Estimate poses of ``video`` ``[B, F, 3, H, W]`` in [-1, 1]; raise only on infrastructure failure (R4)."""
        ...


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of one reward for B videos.

    Attributes:
        scores: one ``[B]`` float32 tensor per reward key; higher is better.
        valid: ``[B]`` bool; False marks an infrastructure failure, which leaves mean, std and loss (R4).
        parts: unweighted, physical quantities for people (metres, degrees), ``[B]`` each.
        diagnostics: anything else worth logging, ``[B]`` each.
    """

    scores: Mapping[str, Tensor]
    valid: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    def masked_by_finite(self) -> RewardOutput:
        """Turn non-finite scores into invalid samples with score 0, so that NaN never enters a mean."""
        finite = self.valid.clone()
        for score in self.scores.values():
            finite &= torch.isfinite(score)
        scores = {key: torch.where(finite, score, torch.zeros_like(score)) for key, score in self.scores.items()}
        return RewardOutput(scores, finite, self.parts, self.diagnostics)

    def map(self, change: Callable[[Tensor], Tensor]) -> RewardOutput:
        """The same with every tensor replaced by ``change(tensor)``."""
        groups = (self.scores, self.parts, self.diagnostics)
        scores, parts, diagnostics = ({key: change(value) for key, value in group.items()} for group in groups)
        return RewardOutput(scores, change(self.valid), parts, diagnostics)


@runtime_checkable
class Reward(Protocol):
    """A named scorer that may emit several reward keys (the geometry reward emits ``rot`` and ``trans``)."""

    name: str
    keys: tuple[str, ...]

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` float32 in [-1, 1], one per condition of ``batch``."""
        ...
