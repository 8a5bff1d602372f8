"""The geometry reward: how well the generated video's camera follows the target, in metres and degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.geometry import so3
from geoalign.geometry.reward_terms import WeightKind
from geoalign.geometry.reward_terms import temporal_weights as weights_over_frames
from geoalign.rewards.base import PoseEvaluator, RewardOutput
from geoalign.types import RetakeBatch


class GeometryReward:
    """Paper eq. 3 (translation) and eq. 4 (rotation), negated so that higher is better.

    Errors per frame are clamped (a lost track is the worst error, not infinity), then summed with temporal
    weights that grow with time. Emits the keys ``trans`` (metres) and ``rot`` (radians); ``parts`` are unweighted.

    Args:
        evaluator: reads the camera from the video; never sees the target.
        temporal_weights: growth of w_i: linear, power, exponential, or constant (a deviation from the paper).
        max_translation_m, max_rotation_deg: the clamped worst errors per frame.
        min_tracked: below this tracked share the video has no readable camera and gets the worst error (content
            failure: valid, counted in ``diagnostics["lost"]``).
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
        self.evaluator, self.temporal_weights, self.min_tracked = evaluator, temporal_weights, min_tracked
        self.max_translation_m, self.max_rotation_deg = max_translation_m, max_rotation_deg

    @torch.no_grad()
    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]`` against ``batch.target_camera`` re-based to its first frame."""
        estimate = self.evaluator(videos, batch.source)
        target = batch.target_camera.relative_to_first().c2w[:, estimate.frame_indices].float()
        translation = so3.safe_norm(estimate.c2w[..., :3, 3] - target[..., :3, 3])  # [B, K] metres
        rotation = torch.rad2deg(so3.relative_angle(estimate.c2w[..., :3, :3], target[..., :3, :3]))
        lost = (estimate.tracked < self.min_tracked)[:, None]
        later = estimate.frame_indices > 0  # frame 0 is given and counts as exact
        translation = later * torch.where(lost, self.max_translation_m, translation.clamp_max(self.max_translation_m))
        rotation = later * torch.where(lost, self.max_rotation_deg, rotation.clamp_max(self.max_rotation_deg))
        weight = weights_over_frames(videos.shape[1], self.temporal_weights, frame_indices=estimate.frame_indices)
        moved = path_length(estimate.c2w) / path_length(target).clamp_min(1e-6)
        frames = later.sum()
        return RewardOutput(
            scores={"trans": -(translation * weight).sum(1), "rot": -(torch.deg2rad(rotation) * weight).sum(1)},
            valid=torch.isfinite(translation).all(1) & torch.isfinite(rotation).all(1),
            parts={
                "trans_m": translation.sum(1) / frames,
                "rot_deg": rotation.sum(1) / frames,
                "path_length_ratio": moved,
            },
            diagnostics={"lost": lost[:, 0].float(), "tracked": estimate.tracked, **estimate.diagnostics},
        )


def path_length(c2w: Tensor) -> Tensor:
    """Length in metres of the camera path ``[..., F, 4, 4]``."""
    return c2w[..., :3, 3].diff(dim=-2).norm(dim=-1).sum(-1)


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
