"""From video frames to the images MapAnything was trained on: resize, centre crop, 8-bit rounding, normalisation.

The published loader reads 8-bit images and resizes them with Pillow (Lanczos when shrinking, bicubic when enlarging),
rounding to 8 bits after the horizontal and again after the vertical pass. Both passes are constant matrices here, so
the result differs from Pillow's only where its fixed-point sum and our float32 sum fall on two sides of a rounding tie.
All shapes are static and no value is read back to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geoalign.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# (width, height) of the training resolution set whose longer side is 518.
_TRAINED_SIZES = ((518, 518), (518, 392), (518, 336), (518, 294), (518, 252), (518, 168),
                  (392, 518), (336, 518), (294, 518), (252, 518))  # fmt: skip
# Keeps floor() from losing a pixel when the scaled size is an integer up to rounding.
_SCALE_SLACK = 1e-8


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """How one frame size maps to the network's image size; all sizes are (height, width) in pixels.

    Attributes:
        source: size of the video frames.
        resized: size after the resize that keeps the aspect ratio.
        output: size after the centre crop.
        offset: rows above and columns left of the crop.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    output: tuple[int, int]
    offset: tuple[int, int]


def plan_resize(height: int, width: int) -> ResizePlan:
    """The published mapping: nearest trained aspect ratio, resize to cover it, crop the centre."""
    if height <= 0 or width <= 0:
        raise UsageError(f"frames of {height} x {width} pixels cannot be resized")
    ratio = width / height
    out_width, out_height = min(_TRAINED_SIZES, key=lambda size: abs(size[0] / size[1] - ratio))
    scale = max(out_width / width, out_height / height) + _SCALE_SLACK
    resized = (math.floor(height * scale), math.floor(width * scale))
    # round() ties go to even, as in the published crop.
    offset = (round((resized[0] - out_height) / 2), round((resized[1] - out_width) / 2))
    return ResizePlan((height, width), resized, (out_height, out_width), offset)


def _lanczos3(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _cubic(x: Tensor) -> Tensor:
    # Keys' cubic with a = -1/2.
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def resize_matrix(source: int, target: int) -> Tensor:
    """``[target, source]`` float64 matrix of Pillow's resize along one axis; every row sums to 1.

    Shrinking widens the filter by the scale (Lanczos-3); enlarging interpolates (cubic). Taps outside the image are
    dropped and the rest renormalised.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    filter_, radius = (_lanczos3, 3) if scale > 1 else (_cubic, 2)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    first = (centre - radius * stretch + 0.5).floor()[:, None]
    last = (centre + radius * stretch + 0.5).floor()[:, None]
    column = torch.arange(source, dtype=torch.float64)[None]
    weights = filter_((column + 0.5 - centre[:, None]) / stretch)
    weights = torch.where((column >= first) & (column < last), weights, 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def _round_half_up(x: Tensor) -> Tensor:
    """To the nearest level 0..255, ties upwards as in Pillow's fixed-point shift."""
    return (x + 0.5).floor().clamp(0, 255)


class Preprocessor(nn.Module):
    """8-bit frames to network images, for one frame size.

    Buffers are float32 constants; there are no parameters. The products need plain float32, not TF32; the evaluator
    sees to that.
    """

    def __init__(self, plan: ResizePlan) -> None:
        super().__init__()
        self.plan = plan
        top, left = plan.offset
        vertical = resize_matrix(plan.source[0], plan.resized[0])[top : top + plan.output[0]]
        horizontal = resize_matrix(plan.source[1], plan.resized[1])[left : left + plan.output[1]]
        self.register_buffer("vertical", vertical.float(), persistent=False)
        self.register_buffer("horizontal", horizontal.float().T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def resize(self, frames: Tensor) -> Tensor:
        """uint8 ``[..., 3, H, W]`` to resized and cropped levels 0..255, float32 ``[..., 3, h, w]``."""
        if tuple(frames.shape[-2:]) != self.plan.source:
            raise UsageError(f"expected frames of {self.plan.source} pixels, got {tuple(frames.shape[-2:])}")
        levels = _round_half_up(frames.float() @ self.horizontal)
        return _round_half_up(self.vertical @ levels)

    def normalise(self, levels: Tensor) -> Tensor:
        """Levels 0..255 to ImageNet-normalised values."""
        return (levels / 255 - self.mean) / self.std

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[..., 3, H, W]`` to the network's input ``[..., 3, h, w]``."""
        return self.normalise(self.resize(frames))


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1] to the nearest of the 256 levels that a video file would store. NaN has none: mask it first."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
