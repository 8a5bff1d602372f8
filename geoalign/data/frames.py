"""Frames: scale to cover the target size and cut the centre; to float32 and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.geometry.lens import cover_size


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


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(frames: Tensor) -> Tensor:
    """Float frames in [-1, 1] (clamped) to uint8, rounded."""
    return frames.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
