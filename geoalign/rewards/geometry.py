"""The geometry reward: how well the generated video's camera follows the target, in metres and degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.geometry.metrics import scale_ratio
from geoalign.geometry.reward_terms import (
    WeightKind,
    rotation_distance,
    temporal_weights,
    translation_bound,
    translation_distance,
    translation_errors,
)
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import RewardOutput
from geoalign.types import RetakeBatch


class GeometryReward:
    """Paper eq. 3 (translation) and eq. 4 (rotation), negated so that higher is better.

    Errors per frame are summed with temporal weights that grow with time. Emits the keys ``trans`` (metres) and ``rot``
    (radians). ``parts`` are unweighted and without a bound; ``saturated_fraction`` is the share of frames that the
    bound acted on.

    Args:
        evaluator: reads the camera from the video; never sees the target.
        temporal_weights: growth of w_i: linear, power, exponential, or constant (a deviation from the paper).
        translation_bound: in ``trans`` a frame's error counts at most this many times the target's largest distance
            from its start (at least 1 m). The one deviation from eq. 3; ``inf`` switches it off.
        min_tracked: below this tracked share the video has no readable camera: it is lost (content failure, R4).
    """

    name = "geometry"
    keys = ("rot", "trans")

    def __init__(
        self,
        evaluator: PoseEvaluator,
        *,
        temporal_weights: WeightKind = "linear",
        translation_bound: float = 4.0,
        min_tracked: float = 0.15,
    ) -> None:
        if not (translation_bound > 0 and 0 <= min_tracked <= 1):
            raise UsageError(
                f"need translation_bound > 0 and 0 <= min_tracked <= 1, got {translation_bound} and {min_tracked}"
            )
        self.evaluator, self.temporal_weights = evaluator, temporal_weights
        self.translation_bound, self.min_tracked = translation_bound, min_tracked

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` against ``batch.target_camera`` re-based to its first frame."""
        estimate = self.evaluator(videos, batch.source)
        path = batch.target_camera.relative_to_first().c2w.float()
        target, bound = path[:, estimate.frame_indices], translation_bound(path, self.translation_bound)
        lost = estimate.tracked < self.min_tracked
        # A pose that is not a number is the scorer's failure, or a broken video's; a lost camera has a pose.
        valid = torch.isfinite(estimate.c2w).flatten(1).all(1)
        later = (estimate.frame_indices > 0).float()  # frame 0 is given
        weight = temporal_weights(videos.shape[1], self.temporal_weights, frame_indices=estimate.frame_indices)
        poses, even = (estimate.c2w, target), later / later.sum()
        scores = {
            "trans": -translation_distance(*poses, weight * later, bound),
            "rot": -rotation_distance(*poses, weight * later),
        }
        parts = {
            "trans_m": translation_distance(*poses, even),
            "rot_deg": torch.rad2deg(rotation_distance(*poses, even)),
            "scale_ratio": scale_ratio(CameraTrajectory.build(estimate.c2w), CameraTrajectory.build(target)),
            "saturated_fraction": ((translation_errors(*poses) > bound[:, None]) * even).sum(-1),
        }
        scores, parts = (
            {key: value.masked_fill(lost, torch.nan) for key, value in values.items()} for values in (scores, parts)
        )
        cameras = estimate.c2w.new_full((*videos.shape[:2], 4, 4), torch.nan)
        cameras[:, estimate.frame_indices] = estimate.c2w.masked_fill(lost[:, None, None, None], torch.nan)
        diagnostics = {"tracked": estimate.tracked, **estimate.diagnostics}
        return RewardOutput(scores, valid, parts, diagnostics, lost & valid, cameras)


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
