"""Which frames Qwen2-VL scorers see, at which size and with which statistics.

The patches are computed by ``geoalign_kernels.frame_preprocess``, see :mod:`geoalign.frozen.frames`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoalign.errors import UsageError

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
