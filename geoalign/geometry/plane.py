"""Pinhole cameras above a plane: where the rays of pixels meet the ground.

Conventions: OpenCV camera axes, camera-to-world poses relative to a reference frame (the source's first frame), metres.
A plane is ``[..., 4] = (nx, ny, nz, d)`` with unit normal n and n . X = d in that reference frame, d > 0: n points from
the reference camera towards the ground.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.geometry import so3

# Rays that meet the plane behind the camera or beyond this many plane distances are clamped to a far point.
_MIN_APPROACH = 0.05


def pixel_rays(intrinsics: Tensor, pixels: Tensor) -> Tensor:
    """Camera-frame ray directions with z = 1.

    Args:
        intrinsics: ``[..., 4]`` fx, fy, cx, cy as fractions of (W, H, W, H).
        pixels: ``[N, 2]`` (x / W, y / H), pixel centres at half-integers before the division.

    Returns:
        ``[..., N, 3]`` directions.
    """
    xy = (pixels - intrinsics[..., None, 2:]) / intrinsics[..., None, :2]
    return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)


def intersect_plane(c2w: Tensor, rays: Tensor, plane: Tensor) -> Tensor:
    """Points where rays meet the plane.

    Args:
        c2w: ``[..., 4, 4]`` camera poses.
        rays: ``[..., N, 3]`` camera-frame directions.
        plane: ``[..., 4]``.

    Returns:
        ``[..., N, 3]`` points in the reference frame; rays that would miss are clamped to a far point, with
        finite gradients.
    """
    normal, distance = plane[..., None, :3], plane[..., 3:]
    directions = rays @ c2w[..., :3, :3].transpose(-1, -2)
    origin = c2w[..., None, :3, 3]
    approach = (directions * normal).sum(-1).clamp_min(_MIN_APPROACH)
    height = distance - (origin * normal).sum(-1)
    return origin + directions * (height / approach)[..., None]


def ground_axes(plane: Tensor) -> Tensor:
    """Orthonormal axes ``[..., 3, 3]`` (rows e1, e2, n): e1 is the camera's x axis laid onto the plane, e2 = n x e1."""
    normal = plane[..., :3]
    x_axis = torch.zeros_like(normal)
    x_axis[..., 0] = 1
    e1 = x_axis - (x_axis * normal).sum(-1, keepdim=True) * normal
    e1 = e1 / e1.norm(dim=-1, keepdim=True)
    return torch.stack([e1, torch.linalg.cross(normal, e1), normal], dim=-2)


def ground_motion(c2w: Tensor, plane: Tensor) -> Tensor:
    """Motion ``[..., F, 4]`` along the plane's axes of poses ``[..., F, 4, 4]`` relative to its reference frame.

    Metres along e1 (sideways), e2 (backward over the ground) and the normal, and radians about the normal (yaw).
    """
    axes = ground_axes(plane)[..., None, :, :]
    turn = (axes @ so3.log(c2w[..., :3, :3])[..., None])[..., 2:, 0]
    return torch.cat([(axes @ c2w[..., :3, 3:])[..., 0], turn], -1)


def scaled_motion(c2w: Tensor, plane: Tensor, factor: Tensor) -> Tensor:
    """Multiply motions.

    Args:
        c2w: ``[..., F, 4, 4]`` poses relative to the plane's reference frame, rotations below 180 degrees.
        plane: ``[..., 4]``.
        factor: ``[..., F or 1, 4]``: of translation along e1, e2 (on the plane) and the normal; of the rotation vector.

    Returns:
        ``[..., F, 4, 4]``; equal to ``c2w`` for factors of 1 up to rounding.
    """
    axes = ground_axes(plane)[..., None, :, :]
    local = axes @ c2w[..., :3, 3:]
    translation = axes.transpose(-1, -2) @ (local * factor[..., :3, None])
    rotvec = so3.log(c2w[..., :3, :3]) * factor[..., 3:]
    return so3.rigid(so3.exp(rotvec), translation[..., 0])


def pixel_grid(height: int, width: int, *, step: int = 1, offset: int = 0) -> Tensor:
    """Centres of every ``step``-th pixel as fractions of (W, H), ``[N, 2]`` row-major, starting at pixel ``offset``."""
    y = (torch.arange(offset, height, step, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(offset, width, step, dtype=torch.float32) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x.flatten(), grid_y.flatten()], dim=-1)
