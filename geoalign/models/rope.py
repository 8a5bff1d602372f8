"""Three-axis rotary positions: which angle a token has on every channel pair.

Pairs of adjacent channels (2i, 2i + 1) are rotated, by :func:`geoalign_kernels.qk_norm_rotary`. A head's pairs are
split over (time, row, column); pair j of an axis with D channels turns by ``scale * theta ** (-2j / D)`` radians per
index (Wan2.1: theta 10000, scale 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from geoalign.config.model import ModelConfig


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of (time, row, column); ``head_dim`` 128 gives 22, 21, 21."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@lru_cache(maxsize=64)
def axis_frequencies(config: ModelConfig, axis: int, device: torch.device) -> Tensor:
    """Radians per index of the pairs of ``axis`` (0 time, 1 row, 2 column), float32 ``[pairs]``."""
    pairs = axis_pairs(config.head_dim)[axis]
    kind = 0 if axis == 0 else 1
    exponent = torch.arange(pairs, dtype=torch.float64) / pairs
    return (config.rope_scale[kind] * config.rope_theta[kind] ** -exponent).float().to(device)


@lru_cache(maxsize=64)
def grid_angles(config: ModelConfig, frames: tuple[int, ...], rows: int, columns: int, device: torch.device) -> Tensor:
    """Angles ``[len(frames) * rows * columns, head_dim / 2]`` of tokens in (frame, row, column) order.

    ``frames`` are the rotary frame indices, which need not be consecutive (target and source frames may share them).
    """
    axes = (torch.tensor(frames), torch.arange(rows), torch.arange(columns))
    parts = []
    for axis, index in enumerate(axes):
        angle = index.to(device, torch.float32)[:, None] * axis_frequencies(config, axis, device)
        shape = [1, 1, 1, angle.shape[1]]
        shape[axis] = len(index)
        parts.append(angle.view(shape).expand(len(frames), rows, columns, -1))
    return torch.cat(parts, -1).flatten(0, 2)


def frame_indices(config: ModelConfig, target_frames: int, source_frames: int) -> tuple[int, ...]:
    """Rotary frame indices of the joined sequence, target first."""
    first = 1 if config.first_frame_given else 0
    target: Sequence[int] = range(first, first + target_frames)
    start = first + target_frames if config.rope_layout == "sequential" else 0
    return (*target, *range(start, start + source_frames))
