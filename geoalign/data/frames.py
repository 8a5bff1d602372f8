"""Frame geometry: scale to cover the target size, cut the centre, and let the intrinsics follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cover_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after scaling ``height x width`` until it covers ``size = (H, W)``."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def stretch(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale uint8 ``[F, 3, h, w]`` to exactly ``size = (H, W)`` (bilinear, antialiased), uint8."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)


def cover_crop(frames: Tensor, size: tuple[int, int], shown: tuple[int, int] | None = None) -> Tensor:
    """Scale uint8 ``[F, 3, h, w]`` to cover ``size = (H, W)`` (bilinear, antialiased) and cut the centre, uint8.

    ``shown`` (height, width) is the size on a screen of frames whose pixels are not square; default h, w.
    """
    height, width = shown or frames.shape[-2:]
    return centre_crop(stretch(frames, cover_size(height, width, size)), size)


def centre_crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre ``size = (H, W)`` of ``[..., h, w]``."""
    top, left = (frames.shape[-2] - size[0]) // 2, (frames.shape[-1] - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]


def cover_crop_intrinsics(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Intrinsics after :func:`cover_crop`.

    Args:
        intrinsics: ``[..., 4]`` (fx, fy, cx, cy) as fractions of (W, H, W, H) of the ``height x width`` frame.
        height: frame height before the crop.
        width: frame width before the crop.
        size: (H, W) after it.

    Returns:
        ``[..., 4]`` as fractions of the new frame, same dtype.
    """
    scaled_height, scaled_width = cover_size(height, width, size)
    top, left = (scaled_height - size[0]) // 2, (scaled_width - size[1]) // 2
    gain = intrinsics.new_tensor([scaled_width / size[1], scaled_height / size[0]]).repeat(2)
    shift = intrinsics.new_tensor([0.0, 0.0, left / size[1], top / size[0]])
    return intrinsics * gain - shift


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(frames: Tensor) -> Tensor:
    """Float frames in [-1, 1] (clamped) to uint8, rounded."""
    return frames.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
