"""Frames to Qwen2-VL patches in torch: sampling, resize with 8-bit rounding, normalisation, patch order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.rewards.vlm.layout import QwenLayout

# CLIP statistics, RGB (openai/CLIP), as Qwen2-VL uses them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def fit_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area lies in the given range (Qwen2-VL's rule).

    Raises UsageError for an aspect ratio above 200 or empty frames.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise UsageError(f"frames of {height} x {width} pixels cannot be scored (aspect ratio above 200 or empty)")
    fit_h, fit_w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if fit_h * fit_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fit_h, fit_w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif fit_h * fit_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fit_h, fit_w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return fit_h, fit_w


def sample_frames(frames: int, clip_fps: float, *, sample_fps: float = 2.0, fewest: int = 4) -> tuple[int, ...]:
    """VideoAlign's frame choice: an even count at ``sample_fps``, spread over the whole clip.

    Raises UsageError when the clip is too short for ``fewest`` frames.
    """
    if clip_fps <= 0 or frames < fewest:
        raise UsageError(f"VideoAlign needs at least {fewest} frames and a positive fps, got {frames} and {clip_fps}")
    wanted = min(max(frames / clip_fps * sample_fps, fewest), frames // 2 * 2)
    count = round(wanted / 2) * 2
    return tuple(torch.linspace(0, frames - 1, count).round().long().tolist())


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1] to the nearest of the 256 levels that a video file would store."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PatchMaker(nn.Module):
    """8-bit frames of one size to flat patches in Qwen2-VL's order. Constants only; static shapes.

    Args:
        size: (height, width) of the incoming frames.
        layout: patch sizes.
        min_pixels, max_pixels: area range of the resized frame.
    """

    def __init__(self, size: tuple[int, int], layout: QwenLayout, *, min_pixels: int, max_pixels: int) -> None:
        super().__init__()
        self.size, self.layout = size, layout
        self.fitted = fit_size(*size, factor=layout.factor, min_pixels=min_pixels, max_pixels=max_pixels)
        self.grid = (self.fitted[0] // layout.patch, self.fitted[1] // layout.patch)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def tokens_per_slice(self) -> int:
        """Visual tokens that the text model sees per temporal slice."""
        return self.grid[0] * self.grid[1] // self.layout.merge**2

    def resize(self, frames: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` to levels 0..255 as float32 ``[N, 3, h, w]``, rounded like an 8-bit image."""
        if tuple(frames.shape[-2:]) != self.size:
            raise UsageError(f"expected frames of {self.size} pixels, got {tuple(frames.shape[-2:])}")
        levels = frames.float()
        if self.fitted != self.size:
            levels = F.interpolate(levels, self.fitted, mode="bicubic", antialias=True, align_corners=False)
        return levels.round().clamp(0, 255)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, T, 3, H, W]`` to float32 ``[B, T / 2, S, patch_values]``; a single frame is shown twice."""
        batch, count = frames.shape[:2]
        part, patch, merge = self.layout.temporal_patch, self.layout.patch, self.layout.merge
        if count != 1 and count % part:
            raise UsageError(f"the number of frames must be 1 or a multiple of {part}, got {count}")
        pixels = (self.resize(frames.flatten(0, 1)) / 255 - self.mean) / self.std
        pixels = pixels.unflatten(0, (batch, count))
        if count == 1:
            pixels = pixels.expand(-1, part, -1, -1, -1)
        rows, columns = self.grid
        x = pixels.reshape(batch, -1, part, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        # (b, t, dt, c, Y, my, py, X, mx, px) -> (b, t, Y, X, my, mx, c, dt, py, px)
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
        return x.reshape(batch, -1, rows * columns, self.layout.patch_values)
