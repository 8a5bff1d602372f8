"""Sizes and statistics of the images MapAnything was trained on.

The published loader reads 8-bit images, resizes them with Pillow (Lanczos when shrinking, bicubic when enlarging),
which rounds to 8 bits after the horizontal and again after the vertical pass, and crops the centre. The pixels are
computed by ``geoalign_kernels.frame_preprocess``, see :mod:`geoalign.frozen.frames`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
