"""Definition of the frame pre-processor in plain torch: dense resampling matrices, explicit rounding, a permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.ops.frame_preprocess.op import empty_outputs
from geoalign_kernels.ops.frame_preprocess.plan import MERGE, PAIR, PATCH, PATCH_VALUES


def to_levels(video: Tensor) -> Tensor:
    """Pixels to float32 levels 0..255, values in [-1, 1] to the nearest one (ties to even), NaN to 0."""
    if video.dtype == torch.uint8:
        return video.float()
    return ((video.float() + 1) * 127.5).round().nan_to_num(0.0).clamp(0, 255)


def frame_preprocess(
    video: Tensor, axes: list[Tensor], slots: Tensor, levels: Tensor, counts: list[int], reads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``op.frame_preprocess``; ``reads`` serves the CUDA kernel only."""
    matrices = [_matrix(axes[2 * i], axes[2 * i + 1], video.shape[-1 - i % 2]) for i in range(6)]
    # A frame that an output does not show has slot -1 and sorts first.
    order = slots.argsort(dim=1)
    shown = [order[i, slots.shape[1] - count :] for i, count in enumerate(counts)]
    outputs = empty_outputs(video, axes, counts)
    for i, one in enumerate(video.split(1)):  # the intermediate images of a whole batch would not fit a GPU
        for output, part in zip(outputs, _one_clip(one, matrices, shown, levels), strict=True):
            output[i : i + 1] = part
    return outputs


def _one_clip(
    video: Tensor, matrices: list[Tensor], shown: list[Tensor], levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    frames = [to_levels(video[:, index]) for index in shown]
    geometry = _pillow(frames[0], *matrices[:2])
    across, down = matrices[2:4]
    clip = (down @ (frames[1] @ across.T)).round().clamp(0, 255)
    still = _pillow(frames[2], *matrices[4:]).repeat_interleave(PAIR, dim=1)
    return (
        _normalise(geometry, levels[0]),
        _patches(_normalise(clip, levels[1])),
        _patches(_normalise(still, levels[1])),
    )


def _pillow(frames: Tensor, across: Tensor, down: Tensor) -> Tensor:
    return _half_up(down @ _half_up(frames @ across.T))


def _matrix(first: Tensor, weights: Tensor, source: int) -> Tensor:
    """[outputs, source] float32."""
    column = first.long()[:, None] + torch.arange(weights.shape[1], device=first.device)
    return weights.new_zeros(weights.shape[0], source).scatter_add(1, column, weights)


def _half_up(x: Tensor) -> Tensor:
    """To the nearest level, ties upwards as in Pillow's fixed-point shift."""
    return (x + 0.5).floor().clamp(0, 255)


def _normalise(image: Tensor, table: Tensor) -> Tensor:
    """[..., 3, h, w] levels through the table [3, 256]."""
    channel = torch.arange(3, device=image.device)[:, None, None]
    return table[channel, image.long()]


def _patches(frames: Tensor) -> Tensor:
    """[B, T, 3, h, w] to [B, T / 2, patches, 1176]."""
    batch, count, _, height, width = frames.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    x = frames.reshape(batch, count // PAIR, PAIR, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    # (b, t, dt, c, Y, my, py, X, mx, px) -> (b, t, Y, X, my, mx, c, dt, py, px)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(batch, count // PAIR, rows * columns * MERGE**2, PATCH_VALUES)
