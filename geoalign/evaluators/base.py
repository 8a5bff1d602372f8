"""What an evaluator is: a video and its source in, metric camera poses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from geoalign.types import SourceClip

NO_PLANE = (
    "the {} evaluator needs the ground plane of the source clip, in metres (ground_plane in its camera file); for "
    "clips without one, evaluator mapanything with evaluator_options.checkpoint reads images alone"
)


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
