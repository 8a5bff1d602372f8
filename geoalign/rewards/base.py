"""What a reward is: videos and their conditions in; scores, a valid mask and named diagnostics out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from geoalign.errors import RewardError
from geoalign.types import RetakeBatch


class ScorerTimeoutError(RewardError):
    """A scorer did not answer in time."""


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of one reward for B videos.

    Attributes:
        scores: one ``[B]`` float32 tensor per reward key; higher is better.
        valid: ``[B]`` bool; False marks an infrastructure failure, which leaves mean, std and loss (R4).
        parts: unweighted, physical quantities for people (metres, degrees), ``[B]`` each.
        diagnostics: anything else worth logging, ``[B]`` each.
        lost: ``[B]`` bool; True marks a content failure: the reward ran, but the video shows nothing that it can read
            (no camera). Scores and parts are NaN there. Such a sample stays valid, leaves mean and std, and gets the
            lowest advantage of its group (R4). By default none is lost.
        cameras: ``[B, F, 4, 4]``, the camera that was read from each video relative to its first frame, in metres, for
            people to look at; NaN at frames that were not read and where it is lost. None: reads no cameras.
    """

    scores: Mapping[str, Tensor]
    valid: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))
    cameras: Tensor | None = None

    def __post_init__(self) -> None:
        if self.lost.dim() == 0:
            object.__setattr__(self, "lost", self.lost.to(self.valid.device).expand(self.valid.shape))

    def masked_by_finite(self) -> RewardOutput:
        """Turn non-finite scores of samples that are not lost into invalid samples with score 0."""
        finite = self.valid.clone()
        for score in self.scores.values():
            finite &= torch.isfinite(score) | self.lost
        scores = {key: torch.where(finite, score, torch.zeros_like(score)) for key, score in self.scores.items()}
        return replace(self, scores=scores, valid=finite, lost=self.lost & finite)

    def map(self, change: Callable[[Tensor], Tensor]) -> RewardOutput:
        """The same with every tensor replaced by ``change(tensor)``."""
        groups = (self.scores, self.parts, self.diagnostics)
        scores, parts, diagnostics = ({key: change(value) for key, value in group.items()} for group in groups)
        cameras = None if self.cameras is None else change(self.cameras)
        return RewardOutput(scores, change(self.valid), parts, diagnostics, change(self.lost), cameras)


@runtime_checkable
class Reward(Protocol):
    """A named scorer that may emit several reward keys (the geometry reward emits ``rot`` and ``trans``)."""

    name: str
    keys: tuple[str, ...]

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` float32 in [-1, 1], one per condition of ``batch``."""
        ...
