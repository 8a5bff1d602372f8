"""Tables of the frame pre-processor, computed on the host and checked there.

Output i of an axis is sum_k weights[i, k] * input[first[i] + k]. Two filters are used, which widen with the scale, drop
taps outside the image and renormalise the rest. For the cropped image it is Pillow's (Lanczos-3 when shrinking, Keys'
cubic when enlarging), for the patches of stills Pillow's cubic: computed in float64 and rounded to Pillow's fixed
point, which float32 holds exactly. For the patches of clips it is torch's antialiased bicubic, whose float32 weights
are read off torch: recomputed ones differ by 1e-5, and that moves one value in two thousand across a rounding tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = (14, 84)
"""Output rows and columns of one CUDA block: kTileHeight, kTileWidth of frame_tile.cuh."""
PATCH, MERGE, PAIR = 14, 2, 2
"""Pixels per patch side, patches per token side, frames per patch of Qwen2-VL's vision tower."""
PATCH_VALUES = 3 * PAIR * PATCH * PATCH
PILLOW_ONE = 1 << 22
"""A weight of 1 in Pillow's fixed point for 8-bit images."""

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, std) per RGB channel, of values in [0, 1]."""


@dataclass(frozen=True, slots=True)
class CropTarget:
    """Resize to ``resized``, then cut ``output`` at ``offset``; (height, width) in pixels."""

    resized: tuple[int, int]
    output: tuple[int, int]
    offset: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Everything ``frame_preprocess`` needs besides the pixels; build it with ``frame_plan``.

    Attributes:
        size: (height, width) of the source frames.
        axes: (first [n] int32, weights [n, taps] float32) for x and y of geometry, clip and still: 12 tensors.
        slots: [3, frames] int32, the position of a frame among the geometry, clip and still frames, or -1.
        levels: [2, 3, 256] float32, the normalised value of each 8-bit level per target and channel.
        counts: number of geometry, clip and still frames.
        reads: source rows and columns that the largest CUDA tile reads, of geometry, clip and still.
    """

    size: tuple[int, int]
    axes: tuple[Tensor, ...]
    slots: Tensor
    levels: Tensor
    counts: tuple[int, int, int]
    reads: tuple[int, ...]

    def to(self, device: torch.device | str) -> FramePlan:
        """The plan with its tables on ``device``."""
        return replace(
            self,
            axes=tuple(t.to(device) for t in self.axes),
            slots=self.slots.to(device),
            levels=self.levels.to(device),
        )


def frame_plan(
    size: tuple[int, int],
    frames: int,
    geometry: CropTarget,
    patches: tuple[int, int],
    *,
    geometry_frames: Sequence[int],
    clip_frames: Sequence[int],
    still_frames: Sequence[int],
    geometry_statistics: Statistics,
    patch_statistics: Statistics,
) -> FramePlan:
    """Plan for clips of ``frames`` frames of ``size`` = (height, width) pixels.

    Args:
        size: of the source frames.
        frames: of a clip.
        geometry: resize and crop of the geometry model's images.
        patches: (height, width) of the resized frame that is cut into patches; multiples of 28.
        geometry_frames, clip_frames, still_frames: indices of the frames that each output shows, in its order, each
            at most once; a clip shows pairs, so their number is even.
        geometry_statistics, patch_statistics: normalisation.

    Raises:
        ValueError: a size, a crop or a frame index is out of range, repeated or odd in number.
    """
    if min(*size, *geometry.resized, *geometry.output, *patches) < 1:
        raise ValueError(f"sizes must be positive, got {size}, {geometry}, {patches}")
    for resized, output, offset in zip(geometry.resized, geometry.output, geometry.offset, strict=True):
        if offset < 0 or offset + output > resized:
            raise ValueError(f"the crop leaves the resized image: {geometry}")
    if any(side % (PATCH * MERGE) for side in patches):
        raise ValueError(f"the sides of the patch target must be multiples of {PATCH * MERGE}, got {patches}")
    if len(clip_frames) % PAIR:
        raise ValueError(f"a clip shows pairs of frames, got {len(clip_frames)} frames")
    slots = torch.full((3, frames), -1, dtype=torch.int32)
    for row, (name, indices) in enumerate(
        (("geometry", geometry_frames), ("clip", clip_frames), ("still", still_frames))
    ):
        if len(set(indices)) != len(indices) or any(not 0 <= i < frames for i in indices):
            raise ValueError(f"{name}_frames must be distinct indices below {frames}, got {list(indices)}")
        slots[row, list(indices)] = torch.arange(len(indices), dtype=torch.int32)
    resizes = [  # (x, y) of geometry, clip and still
        [
            pillow_taps(size[side], geometry.resized[side], geometry.offset[side], geometry.output[side], "sharpest")
            for side in (1, 0)
        ],
        [torch_taps(size[side], patches[side]) for side in (1, 0)],
        [pillow_taps(size[side], patches[side], 0, patches[side], "cubic") for side in (1, 0)],
    ]
    return FramePlan(
        size,
        tuple(table for axes in resizes for axis in axes for table in axis),
        slots,
        torch.stack([_levels(geometry_statistics), _levels(patch_statistics)]),
        (len(geometry_frames), len(clip_frames), len(still_frames)),
        tuple(_reads(*axis, tile) for x, y in resizes for axis, tile in ((y, TILE[0]), (x, TILE[1]))),
    )


def pillow_taps(
    source: int, target: int, start: int, count: int, filters: Literal["cubic", "sharpest"]
) -> tuple[Tensor, Tensor]:
    """(first [count] int32 ascending, weights [count, taps] float32) of outputs ``start`` .. ``start + count - 1``.

    "cubic" is Pillow's BICUBIC, "sharpest" its LANCZOS when shrinking and its BICUBIC when enlarging, as MapAnything
    has it. Rows are padded with zero weights; first + taps never exceeds ``source``.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    weight, radius = (_lanczos3, 3) if filters == "sharpest" and scale > 1 else (_cubic, 2)
    centre = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale
    low = (centre - radius * stretch + 0.5).floor().clamp(min=0).long()
    high = (centre + radius * stretch + 0.5).floor().clamp(max=source).long()
    length = int((high - low).max())
    first = low.clamp(max=source - length)
    column = first[:, None] + torch.arange(length)
    values = weight((column + 0.5 - centre[:, None]) / stretch)
    values = torch.where((column >= low[:, None]) & (column < high[:, None]), values, 0.0)
    fixed = values / values.sum(dim=1, keepdim=True) * PILLOW_ONE
    fixed = (fixed.abs() + 0.5).floor() * fixed.sign()  # ties away from zero
    return first.int(), (fixed / PILLOW_ONE).float().contiguous()


def torch_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """As ``pillow_taps``, of all outputs: torch's antialiased bicubic, read off what it makes of unit images."""
    units = torch.eye(source, device="cpu")[None, :, None]
    matrix = F.interpolate(units, (1, target), mode="bicubic", antialias=True, align_corners=False)[0, :, 0].T
    used = (matrix != 0).int()
    # An output that falls on an input reads it alone; its window must not start after the next one's.
    low = used.argmax(dim=1).flip(0).cummin(dim=0).values.flip(0)
    high = (source - used.flip(1).argmax(dim=1)).cummax(dim=0).values
    length = int((high - low).max())
    first = low.clamp(max=source - length)
    return first.int(), matrix.gather(1, first[:, None] + torch.arange(length)).contiguous()


def _lanczos3(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _cubic(x: Tensor) -> Tensor:
    # Keys' cubic with a = -1/2.
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def _levels(statistics: Statistics) -> Tensor:
    """[3, 256] in float32 throughout, so that the table equals normalising an image."""
    mean, std = (torch.tensor(values)[:, None] for values in statistics)
    return (torch.arange(256.0) / 255 - mean) / std


def _reads(first: Tensor, weights: Tensor, tile: int) -> int:
    """Most source pixels that one tile of outputs reads along an axis."""
    starts = first.long()
    ends = torch.stack([starts[min(i + tile, len(starts)) - 1] for i in range(0, len(starts), tile)])
    return int((ends - starts[::tile]).max()) + weights.shape[1]
