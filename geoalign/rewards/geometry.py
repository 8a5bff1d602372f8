"""The geometry reward: how well the generated video's camera follows the target, in metres and degrees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.geometry.reward_terms import WeightKind, rotation_distance, temporal_weights, translation_distance
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import RewardOutput
from geoalign.types import RetakeBatch


class GeometryReward:
    """Paper eq. 3 (translation) and eq. 4 (rotation), negated so that higher is better.

    Errors per frame are clamped, then summed with temporal weights that grow with time. Emits the keys ``trans``
    (metres) and ``rot`` (radians); ``parts`` are unweighted.

    Args:
        evaluator: reads the camera from the video; never sees the target.
        temporal_weights: growth of w_i: linear, power, exponential, or constant (a deviation from the paper).
        max_translation_m, max_rotation_deg: the clamped worst errors per frame.
        min_tracked: below this tracked share the video has no readable camera: it is lost (content failure, R4).
    """

    name = "geometry"
    keys = ("rot", "trans")

    def __init__(
        self,
        evaluator: PoseEvaluator,
        *,
        temporal_weights: WeightKind = "linear",
        max_translation_m: float = 3.0,
        max_rotation_deg: float = 45.0,
        min_tracked: float = 0.15,
    ) -> None:
        if not (0 < max_translation_m < math.inf and 0 < max_rotation_deg <= 180 and 0 <= min_tracked <= 1):
            raise UsageError(
                "need max_translation_m > 0, 0 < max_rotation_deg <= 180 and 0 <= min_tracked <= 1, got "
                f"{max_translation_m}, {max_rotation_deg} and {min_tracked}"
            )
        self.evaluator, self.temporal_weights, self.min_tracked = evaluator, temporal_weights, min_tracked
        self.max_translation_m, self.max_rotation_deg = max_translation_m, max_rotation_deg

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` against ``batch.target_camera`` re-based to its first frame."""
        estimate = self.evaluator(videos, batch.source)
        target = batch.target_camera.relative_to_first().c2w[:, estimate.frame_indices].float()
        lost = estimate.tracked < self.min_tracked
        # A pose that is not a number is the scorer's failure, or a broken video's; a lost camera has a pose.
        valid = torch.isfinite(estimate.c2w).flatten(1).all(1)
        later = (estimate.frame_indices > 0).float()  # frame 0 is given
        weight = temporal_weights(videos.shape[1], self.temporal_weights, frame_indices=estimate.frame_indices)
        translation, rotation = self._distances(estimate.c2w, target, weight * later)
        mean_m, mean_rad = self._distances(estimate.c2w, target, later / later.sum())
        walked, asked = (CameraTrajectory.build(c2w).path_length() for c2w in (estimate.c2w, target))
        scores = {"trans": -translation, "rot": -rotation}
        parts = {
            "trans_m": mean_m,
            "rot_deg": torch.rad2deg(mean_rad),
            "path_length_ratio": walked / asked.clamp_min(1e-6),
        }
        scores, parts = (
            {key: value.masked_fill(lost, torch.nan) for key, value in values.items()} for values in (scores, parts)
        )
        return RewardOutput(scores, valid, parts, {"tracked": estimate.tracked, **estimate.diagnostics}, lost & valid)

    def _distances(self, estimate: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted metres and radians ``[B]``."""
        worst_m, worst_rad = self.max_translation_m, math.radians(self.max_rotation_deg)
        translation = translation_distance(estimate, target, weight, worst_m=worst_m)
        rotation = rotation_distance(estimate, target, weight, worst_rad=worst_rad)
        return translation, rotation


class SourceConsistencyReward:
    """How well the source frames, moved by the estimated camera, explain the generated frames (a perceptual reward).

    The score is minus the evaluator's robust photometric residual: blur, seams, invented content and flicker all raise
    it. It says nothing about the target camera.
    """

    name = "source_consistency"
    keys = ("consistency",)

    def __init__(self, evaluator: PoseEvaluator) -> None:
        self.evaluator = evaluator

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]``; the unit is that of the evaluator's residual."""
        residual = self.evaluator(videos, batch.source).residual
        return RewardOutput({"consistency": -residual}, torch.isfinite(residual), {"residual": residual})
