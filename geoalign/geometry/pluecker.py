"""Pluecker ray maps and camera vectors as the published retake models consume them.

ReDirector (``model_utils.py``, Wan-Fun control adapter) receives per frame a 19-vector in RealEstate10K layout, but
with a camera-to-world pose, turns it into a six-channel ray map (moment, direction) at full resolution, and packs four
frames into the channels of one latent frame. Upstream edits the caller's intrinsics in place while fitting the aspect
ratio and picks the reference size by the scheduler's state; here nothing is edited and that size is an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry.trajectory import CameraTrajectory


def camera_vectors(trajectory: CameraTrajectory) -> Tensor:
    """ReDirector's ``[..., F, 19]``: 0, fx/W, fy/H, 0.5, 0.5, 0, 0 and the 12 row-major entries of the 3x4 c2w."""
    lens, pose = trajectory.intrinsics, trajectory.c2w[..., :3, :].flatten(-2)
    zero, half = torch.zeros_like(lens[..., :1]), torch.full_like(lens[..., :1], 0.5)
    return torch.cat((zero, lens[..., :2], half, half, zero, zero, pose), -1)


def fit_focal(intrinsics: Tensor, size: tuple[int, int], reference_size: tuple[int, int]) -> Tensor:
    """Focal lengths ``[..., 2]`` in pixels of an image cropped from ``reference_size`` to ``size``, both (H, W).

    The image is thought scaled to cover ``size`` and centre-cropped, so the focal fraction of the cropped side grows.
    """
    (height, width), (ref_height, ref_width) = size, reference_size
    ratio = ref_width / ref_height
    fx, fy = intrinsics[..., 0] * width, intrinsics[..., 1] * height
    if ratio > width / height:
        fx = fx * (height * ratio / width)
    else:
        fy = fy * (width / ratio / height)
    return torch.stack((fx, fy), -1)


def ray_map(trajectory: CameraTrajectory, size: tuple[int, int], *, reference_size: tuple[int, int] | None) -> Tensor:
    """Pluecker coordinates ``[..., F, 6, H, W]`` of every pixel: moment ``c x d`` (3 channels), unit direction d (3).

    Args:
        trajectory: ``[..., F]``; translations in metres, no normalisation of scale. The principal point is the image
            centre, as upstream forces it.
        size: (H, W) of the map.
        reference_size: (H, W) that the focal fractions refer to; None means ``size`` (upstream inference). Upstream's
            training used (1280, 1280).
    """
    height, width = size
    focal = fit_focal(trajectory.intrinsics, size, reference_size or size)
    kwargs = {"dtype": trajectory.dtype, "device": trajectory.device}
    x = (torch.arange(width, **kwargs) + 0.5 - width / 2) / focal[..., 0, None]
    y = (torch.arange(height, **kwargs) + 0.5 - height / 2) / focal[..., 1, None]
    shape = (*focal.shape[:-1], height, width)
    x, y = x.unsqueeze(-2).expand(shape), y.unsqueeze(-1).expand(shape)
    inverse = (x.square() + y.square() + 1).rsqrt()
    local = (x * inverse, y * inverse, inverse)
    rotation, centre = trajectory.rotation[..., None, None], trajectory.position[..., None, None]
    rows = [rotation[..., i, :, :, :].unbind(-3) for i in range(3)]
    direction = [row[0] * local[0] + row[1] * local[1] + row[2] * local[2] for row in rows]
    c = centre.unbind(-3)
    moment = [c[(i + 1) % 3] * direction[(i + 2) % 3] - c[(i + 2) % 3] * direction[(i + 1) % 3] for i in range(3)]
    return torch.stack((*moment, *direction), -3)


def pack_frames(rays: Tensor) -> Tensor:
    """``[..., F, C, H, W]`` with F = 4k + 1 to ``[..., 4C, k + 1, H, W]``; channel ``4 c + j`` is sub-frame j.

    Frame 0 fills its latent frame alone (repeated four times), as in the Wan autoencoder.

    Raises:
        DataError: F is not of the form 4k + 1.
    """
    frames = rays.shape[-4]
    if frames % 4 != 1:
        raise DataError(f"ray maps pack 4k + 1 frames (for instance 81 or 49), got {frames}")
    first = rays[..., :1, :, :, :]
    filled = torch.cat((first, first, first, rays), -4)
    grouped = filled.unflatten(-4, (-1, 4))  # [..., T, 4, C, H, W]
    return grouped.movedim((-3, -4, -5), (-5, -4, -3)).flatten(-5, -4)
