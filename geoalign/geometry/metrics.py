"""Camera errors in metres and degrees, and the two scale-blind public scores they are compared with.

The metric errors re-base both paths to frame 0 and align nothing else, so a wrong scale is an error in metres.
``paired_rotation_error_deg`` and ``sim3_translation_error`` are RotErr and TransErr of the public ReDirector evaluation
(``evaluate.py``, ``eval_utils.py``) in float64. Their known blind spots, which tests pin:

- TransErr fits scale, rotation and shift first: half speed, reversed or sideways motion scores 0 on a straight path.
- TransErr of a target that does not move (pan, tilt) is 0 for any moving estimate and NaN for a constant one, and one
  millimetre of jitter of a static estimate scores 0.25 on a dolly. Report it for moving targets only.
- RotErr averages all ordered frame pairs: a video that ignores a 20 degree pan scores 6.8, not 20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.geometry import so3
from geoalign.geometry.align import Alignment, align, umeyama
from geoalign.geometry.trajectory import CameraTrajectory

_STATIC_PATH_M = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class PoseError:
    """Per-frame errors of one comparison.

    Attributes:
        rotation_deg: ``[..., F]`` degrees.
        translation_m: ``[..., F]`` metres.
        scale: ``[...]`` float64, the scale that the alignment applied to the estimate (1 unless sim3).
    """

    rotation_deg: Tensor
    translation_m: Tensor
    scale: Tensor


def pose_error(estimate: CameraTrajectory, target: CameraTrajectory, *, alignment: Alignment = "first") -> PoseError:
    """Rotation and translation error of every frame after the stated alignment, in the dtype of ``estimate``."""
    aligned, scale = align(estimate, target, alignment)
    rotation = torch.rad2deg(so3.relative_angle(target.rotation, aligned.rotation))
    return PoseError(rotation, so3.safe_norm(aligned.position - target.position), scale)


def rotation_error_deg(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[..., F]`` degrees between orientations relative to frame 0 (frame 0 itself is 0)."""
    return pose_error(estimate.relative_to_first(), target.relative_to_first(), alignment="none").rotation_deg


def translation_error_m(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[..., F]`` metres between camera centres relative to frame 0, no scale alignment."""
    return pose_error(estimate.relative_to_first(), target.relative_to_first(), alignment="none").translation_m


def path_length_ratio(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[...]`` travelled length of the estimate over that of the target; NaN where the target does not move.

    Jitter lengthens a path, so a noisy estimate reads high; :func:`translation_gain` does not have that bias.
    """
    return _ratio(estimate.path_length(), target.path_length(), _STATIC_PATH_M)


def translation_gain(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[...]`` least-squares g of ``estimate = g * target`` over centres relative to frame 0; NaN for a static target.

    1 is metric truth, 0.5 half the motion, negative the opposite direction.
    """
    a = estimate.relative_to_first().position
    b = target.relative_to_first().position
    return _ratio((a * b).sum((-1, -2)), b.square().sum((-1, -2)), _STATIC_PATH_M**2)


def scale_ratio(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[...]`` the reported scale ratio: path length of the estimate over that of the target."""
    return path_length_ratio(estimate, target)


def _ratio(numerator: Tensor, denominator: Tensor, smallest: float) -> Tensor:
    moving = denominator > smallest
    return torch.where(moving, numerator / torch.where(moving, denominator, 1.0), torch.nan)


def paired_rotation_error_deg(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """Public RotErr ``[...]``: mean angle between ``R_i^T R_j`` of both paths over all ordered pairs i != j, degrees.

    With ``D_i = G_i P_i^T`` the trace of a pair's error is that of ``D_i D_j^T``, so one matrix per frame suffices.
    float64. NaN for a single frame.
    """
    g, p = target.rotation.double(), estimate.rotation.double()
    d = so3.matmul(g, p.transpose(-1, -2)).transpose(-1, -2)
    angles = so3.relative_angle(d.unsqueeze(-3), d.unsqueeze(-4))
    frames = d.shape[-3]
    total = angles.sum((-1, -2)) - angles.diagonal(dim1=-2, dim2=-1).sum(-1)
    pairs = torch.as_tensor(float(frames * (frames - 1)), dtype=total.dtype, device=total.device)
    return torch.rad2deg(total / pairs)


def sim3_translation_error(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """Public TransErr ``[...]``: mean residual after the Sim(3) fit, over the target's largest extent + 1e-6; float64.

    Dimensionless, and blind to metric scale (see the module text).
    """
    goal = target.position.double()
    fitted = umeyama(estimate.position, goal).apply_points(estimate.position.double())
    extent = (goal.unsqueeze(-2) - goal.unsqueeze(-3)).norm(dim=-1).amax((-1, -2))
    return (fitted - goal).norm(dim=-1).mean(-1) / (extent + 1e-6)
