"""Every number that says how far a camera path is from another, each defined once.

Tables, reports and studies take them from here. *Position error* (metres), *rotation error* (degrees), *scale ratio*
and *translation gain* re-base both paths to frame 0 and align nothing else, so a wrong scale is an error in metres.
``paired_rotation_error_deg`` and ``sim3_translation_error`` are RotErr and TransErr of the public ReDirector evaluation
(``evaluate.py``, ``eval_utils.py``) in float64. Their known blind spots, which tests pin:

- TransErr fits scale, rotation and shift first: half speed, reversed or sideways motion scores 0 on a straight path.
- TransErr of a target that does not move (pan, tilt) is 0 for any moving estimate and NaN for a constant one, and one
  millimetre of jitter of a static estimate scores 0.25 on a dolly. :func:`camera_errors` reports it for moving targets.
- RotErr averages all ordered frame pairs: a video that ignores a 20 degree pan scores 6.8, not 20.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.geometry import so3
from geoalign.geometry.align import umeyama
from geoalign.geometry.plane import ground_motion
from geoalign.geometry.trajectory import CameraTrajectory

CAMERA_METRICS = (
    "translation_error_m",
    "rotation_error_deg",
    "scale_ratio",
    "translation_gain",
    "rot_err_deg",
    "trans_err",
)
AXES = ("sideways", "forward", "vertical", "yaw")
"""The degrees of freedom of a stabilised camera above a plane, in the order of :func:`ground_motion`."""
_STATIC_PATH_M = 1e-3  # a shorter path is rounding of a camera that turns in place


def camera_errors(estimate: Tensor, target: CameraTrajectory, frame_indices: Tensor | None = None) -> dict[str, Tensor]:
    """All of :data:`CAMERA_METRICS` of each of B videos.

    Args:
        estimate: ``[B, K, 4, 4]`` camera-to-world that was read from the videos, float32 or float64, any world frame.
        target: ``[B, F]`` wanted paths, any world frame.
        frame_indices: ``[K]`` int64, which of the F frames were read, beginning with 0; None: all of them.

    Returns:
        ``[B]`` each, in the dtype of ``estimate``. NaN where a number is not defined: everything of an estimate that is
        not finite, ``scale_ratio``, ``translation_gain`` and ``trans_err`` of a target that does not move, and
        ``trans_err`` of an estimate that does not move.
    """
    wanted = target.c2w if frame_indices is None else target.c2w[:, frame_indices.to(target.device)]
    goal = CameraTrajectory.build(wanted.to(estimate))
    finite = torch.isfinite(estimate).flatten(1).all(1)
    found = CameraTrajectory.build(torch.where(finite[:, None, None, None], estimate, goal.c2w))
    trans_err = sim3_translation_error(found, goal)
    values = {
        "translation_error_m": translation_error_m(found, goal),
        "rotation_error_deg": rotation_error_deg(found, goal),
        "scale_ratio": scale_ratio(found, goal),
        "translation_gain": translation_gain(found, goal),
        "rot_err_deg": paired_rotation_error_deg(found, goal),
        "trans_err": torch.where(goal.path_length() > _STATIC_PATH_M, trans_err, torch.nan),
    }
    return {name: torch.where(finite, value, torch.nan).to(estimate.dtype) for name, value in values.items()}


def position_distances_m(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[..., F]`` metres between camera centres relative to frame 0 (frame 0 itself is 0)."""
    return so3.safe_norm(estimate.relative_to_first().position - target.relative_to_first().position)


def view_angles_deg(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[..., F]`` degrees between orientations relative to frame 0 (frame 0 itself is 0)."""
    return torch.rad2deg(so3.relative_angle(estimate.relative_to_first().rotation, target.relative_to_first().rotation))


def translation_error_m(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """Position error ``[...]``: mean distance over frames 1.. in metres, without an upper bound."""
    return position_distances_m(estimate, target)[..., 1:].mean(-1)


def rotation_error_deg(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """Rotation error ``[...]``: mean view angle over frames 1.. in degrees."""
    return view_angles_deg(estimate, target)[..., 1:].mean(-1)


def scale_ratio(estimate: CameraTrajectory, target: CameraTrajectory) -> Tensor:
    """``[...]`` path length of the estimate over that of the target; NaN where the target does not move.

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


def errors_by_frame(estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
    """``translation_error_m`` and ``rotation_error_deg`` ``[B, K]`` of every frame; NaN where a video is not finite.

    Args:
        estimate, target: ``[B, K, 4, 4]`` camera-to-world, each in any world frame.
    """
    finite = torch.isfinite(estimate).flatten(1).all(1)[:, None]
    found, goal = CameraTrajectory.build(estimate), CameraTrajectory.build(target)
    values = {
        "translation_error_m": position_distances_m(found, goal),
        "rotation_error_deg": view_angles_deg(found, goal),
    }
    return {name: torch.where(finite, value, torch.nan) for name, value in values.items()}


def axis_gains(estimate: Tensor, target: Tensor, plane: Tensor) -> Tensor:
    """Travelled over asked ``[4]`` along :data:`AXES`: least-squares g of ``estimate = g * target`` over all videos.

    Args:
        estimate: ``[B, K, 4, 4]`` camera-to-world relative to the first source frame; videos with values that are not
            finite are left out.
        target: ``[B, K, 4, 4]`` wanted poses, likewise.
        plane: ``[B, 4]`` ground planes in that frame.

    Returns:
        float64; NaN along an axis on which no target moves (by 1 mm or 1 mrad in any frame).
    """
    finite = torch.isfinite(estimate).flatten(1).all(1)
    found, wanted = (ground_motion(c2w[finite].double(), plane[finite].double()) for c2w in (estimate, target))
    return _ratio((found * wanted).sum((0, 1)), wanted.square().sum((0, 1)), _STATIC_PATH_M**2)


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
