"""Bringing an estimated camera path into the frame of a reference path: none, first frame, SE(3) or Sim(3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory

Alignment = Literal["none", "first", "se3", "sim3"]


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """``x -> scale * rotation @ x + translation``.

    Attributes:
        scale: ``[...]``.
        rotation: ``[..., 3, 3]``.
        translation: ``[..., 3]``.
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    def apply_points(self, points: Tensor) -> Tensor:
        """Map points ``[..., N, 3]``."""
        turned = so3.apply(self.rotation.unsqueeze(-3), points)
        return self.scale[..., None, None] * turned + self.translation.unsqueeze(-2)

    def apply(self, trajectory: CameraTrajectory) -> CameraTrajectory:
        """Map a camera path: centres as points, orientations by the rotation alone."""
        rotation = so3.matmul(self.rotation.unsqueeze(-3), trajectory.rotation)
        return CameraTrajectory(so3.rigid(rotation, self.apply_points(trajectory.position)), trajectory.intrinsics)


def umeyama(points: Tensor, target: Tensor, *, with_scale: bool = True) -> Similarity:
    """Least-squares similarity that maps ``points`` onto ``target`` (Umeyama 1991), reflections excluded.

    Args:
        points, target: ``[..., N, 3]``; the fit runs in float64.
        with_scale: False fits a rigid motion (scale 1).

    Returns:
        float64 :class:`Similarity`. Degenerate inputs keep their mathematical meaning: coincident ``points`` have no
        scale (NaN), a coincident ``target`` gives scale 0, points on a line leave the rotation about it free.

    Raises:
        DataError: the two sets differ in shape.
    """
    if points.shape != target.shape:
        raise DataError(f"cannot align {tuple(points.shape)} camera centres to {tuple(target.shape)}: frames differ")
    points, target = points.double(), target.double()
    mean_p, mean_t = points.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    p, t = points - mean_p, target - mean_t
    covariance = (t.unsqueeze(-1) * p.unsqueeze(-2)).mean(-3)
    u, singular, vt = torch.linalg.svd(covariance)
    sign = torch.ones_like(singular)
    sign[..., 2] = torch.linalg.det(so3.matmul(u, vt)).sign()
    rotation = so3.matmul(u * sign.unsqueeze(-2), vt)
    if with_scale:
        scale = (singular * sign).sum(-1) / p.square().sum(-1).mean(-1)
    else:
        scale = torch.ones_like(singular[..., 0])
    translation = mean_t.squeeze(-2) - scale.unsqueeze(-1) * so3.apply(rotation, mean_p.squeeze(-2))
    return Similarity(scale, rotation, translation)


def align(estimate: CameraTrajectory, target: CameraTrajectory, mode: Alignment) -> tuple[CameraTrajectory, Tensor]:
    """Align ``estimate`` ``[..., F]`` to ``target`` ``[..., F]``; returns the path and the applied scale ``[...]``.

    ``none`` compares as given; ``first`` moves the estimate rigidly so that frame 0 coincides (the metric error of the
    reward); ``se3`` and ``sim3`` fit all camera centres. Only ``sim3`` hides an error of metric scale.

    Raises:
        DataError: batch, frame count or mode do not fit.
    """
    if estimate.c2w.shape != target.c2w.shape:
        shapes = f"{tuple(estimate.c2w.shape)} and {tuple(target.c2w.shape)}"
        raise DataError(f"trajectories to compare must have equal batch and frames, got {shapes}")
    one = torch.ones(estimate.batch_shape, dtype=torch.float64, device=estimate.device)
    if mode == "none":
        return estimate, one
    if mode == "first":
        first = so3.compose(target.c2w[..., 0, :, :], so3.invert_rigid(estimate.c2w[..., 0, :, :]))
        return estimate.transformed(first), one
    if mode in ("se3", "sim3"):
        fit = umeyama(estimate.position, target.position, with_scale=mode == "sim3")
        return fit.apply(estimate.to(dtype=torch.float64)).to(dtype=estimate.dtype), fit.scale
    raise DataError(f"unknown alignment {mode!r}; choose none, first, se3 or sim3")
