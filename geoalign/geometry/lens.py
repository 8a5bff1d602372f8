"""How intrinsics follow frames that are scaled to cover a size and cut in the centre."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST_LENS, LONGEST_LENS = 0.05, 50.0
"""Focal length over frame side of pinhole cameras: 169 degrees of view, and 1.1 degrees."""


def lens_fault(intrinsics: Tensor) -> str | None:
    """What is wrong with ``[..., 4]`` fractions (fx, fy, cx, cy) of (W, H, W, H), for a message that goes on "of the
    frames", or None.

    The principal point must lie inside the picture; pixels, or fractions of another frame, seldom do.
    """
    lens = intrinsics.reshape(-1, 4)
    outside = ~((lens[:, 2:] > 0) & (lens[:, 2:] < 1)).all(-1)
    if bool(outside.any()):
        x, y = lens[outside][0, 2:].tolist()
        return f"principal point ({x:g}, {y:g}) outside the picture"
    absurd = ~((lens[:, :2] >= SHORTEST_LENS) & (lens[:, :2] <= LONGEST_LENS)).all(-1)
    if bool(absurd.any()):
        fx, fy = lens[absurd][0, :2].tolist()
        return f"absurd focal length ({fx:g}, {fy:g}), not {SHORTEST_LENS:g} to {LONGEST_LENS:g},"
    return None


def cover_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after scaling ``height x width`` until it covers ``size = (H, W)``."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def cover_crop_intrinsics(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Intrinsics of frames that were scaled to cover ``size`` and cut in the centre.

    Args:
        intrinsics: ``[..., 4]`` (fx, fy, cx, cy) as fractions of (W, H, W, H) of the ``height x width`` frame.
        height: frame height before the crop.
        width: frame width before the crop.
        size: (H, W) after it.

    Returns:
        ``[..., 4]`` as fractions of the new frame, same dtype.
    """
    gain, shift = _crop(intrinsics, height, width, size)
    return intrinsics * gain - shift


def intrinsics_before_crop(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`cover_crop_intrinsics`: from fractions of frames of ``size`` to those of ``height x width``."""
    gain, shift = _crop(intrinsics, height, width, size)
    return (intrinsics + shift) / gain


def intrinsics_before_pad(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Fractions of ``height x width`` frames from those of ``size``, into which they were scaled and padded evenly."""
    scale = min(size[0] / height, size[1] / width)
    share = intrinsics.new_tensor([width * scale / size[1], height * scale / size[0]]).repeat(2)
    margin = torch.cat([torch.zeros_like(share[:2]), (1 - share[2:]) / 2])
    return (intrinsics - margin) / share


def _crop(like: Tensor, height: int, width: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gain and shift ``[4]`` of the intrinsics of ``height x width`` frames that become ``size``."""
    scaled_height, scaled_width = cover_size(height, width, size)
    top, left = (scaled_height - size[0]) // 2, (scaled_width - size[1]) // 2
    gain = like.new_tensor([scaled_width / size[1], scaled_height / size[0]]).repeat(2)
    return gain, like.new_tensor([0.0, 0.0, left / size[1], top / size[0]])
