"""An evaluator that is told the answer: for tests of rewards and of whatever is built on them, never for training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEstimate
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import SourceClip


class OracleEvaluator:
    """PoseEvaluator that looks up each clip's camera by its name; pixels are not read.

    Args:
        paths: clip id -> ``[F, 4, 4]`` camera-to-world in metres, in any world frame (re-based to frame 0 here).
        tracked: the tracked share that it claims for every clip.
        frame_stride: evaluate frames 0, s, 2s, ... only.
    """

    name = "oracle"

    def __init__(self, paths: Mapping[str, Tensor], *, tracked: float = 1.0, frame_stride: int = 1) -> None:
        self.paths, self.tracked, self.frame_stride = dict(paths), tracked, frame_stride

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """The told poses of ``video`` ``[B, F, 3, H, W]``; raises UsageError for a clip nobody told of."""
        strangers = sorted(set(source.clip_ids) - set(self.paths))
        if strangers:
            raise UsageError(f"the oracle was not told the camera of {', '.join(strangers)}")
        indices = torch.arange(0, video.shape[1], self.frame_stride, device=video.device)
        told = torch.stack([self.paths[name] for name in source.clip_ids]).to(video.device, torch.float32)
        c2w = CameraTrajectory.build(told[:, indices]).relative_to_first().c2w
        known = torch.full((len(c2w),), self.tracked, device=video.device)
        return PoseEstimate(c2w, indices, known, torch.zeros_like(known))
