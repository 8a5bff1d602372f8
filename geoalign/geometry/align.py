"""The similarity that fits one set of points best to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry import so3


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


def umeyama(points: Tensor, target: Tensor) -> Similarity:
    """Least-squares similarity that maps ``points`` onto ``target`` (Umeyama 1991), reflections excluded.

    Args:
        points, target: ``[..., N, 3]``; the fit runs in float64.

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
    scale = (singular * sign).sum(-1) / p.square().sum(-1).mean(-1)
    translation = mean_t.squeeze(-2) - scale.unsqueeze(-1) * so3.apply(rotation, mean_p.squeeze(-2))
    return Similarity(scale, rotation, translation)
