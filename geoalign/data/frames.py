"""Frames: scale to cover the target size and cut the centre; to float32 and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.geometry.lens import cover_size


def cover_crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale uint8 ``[F, 3, h, w]`` to cover ``size = (H, W)`` (bilinear, antialiased) and cut the centre, uint8."""
    height, width = cover_size(frames.shape[-2], frames.shape[-1], size)
    if (height, width) != tuple(frames.shape[-2:]):
        frames = F.interpolate(frames, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(frames: Tensor) -> Tensor:
    """Float frames in [-1, 1] (clamped) to uint8, rounded."""
    return frames.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
