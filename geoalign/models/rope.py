"""Three-axis rotary embedding in real arithmetic, and the one place where queries and keys are normalised and rotated.

Pairs of adjacent channels (2i, 2i + 1) are rotated. A head's pairs are split over (time, row, column); pair j of an
axis with D channels turns by ``scale * theta ** (-2j / D)`` radians per index (Wan2.1: theta 10000, scale 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from geoalign.config.model import ModelConfig
from geoalign.models.conditioning import LayerAngles, LayerRotation, Rotation
from geoalign_kernels import qk_norm_rotary


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
    """Angles ``[1, len(frames) * rows * columns, 1, head_dim / 2]`` of tokens in (frame, row, column) order.

    ``frames`` are the rotary frame indices, which need not be consecutive (target and source frames may share them).
    """
    axes = (torch.tensor(frames), torch.arange(rows), torch.arange(columns))
    parts = []
    for axis, index in enumerate(axes):
        angle = index.to(device, torch.float32)[:, None] * axis_frequencies(config, axis, device)
        shape = [1, 1, 1, angle.shape[1]]
        shape[axis] = len(index)
        parts.append(angle.view(shape).expand(len(frames), rows, columns, -1))
    return torch.cat(parts, -1).reshape(1, len(frames) * rows * columns, 1, -1)


@lru_cache(maxsize=16)
def grid_rotation(
    config: ModelConfig, frames: tuple[int, ...], rows: int, columns: int, device: torch.device
) -> Rotation:
    """:func:`grid_angles` as a rotation."""
    return Rotation.from_angle(grid_angles(config, frames, rows, columns, device))


def frame_indices(config: ModelConfig, target_frames: int, source_frames: int) -> tuple[int, ...]:
    """Rotary frame indices of the joined sequence, target first."""
    first = 1 if config.first_frame_given else 0
    target: Sequence[int] = range(first, first + target_frames)
    start = first + target_frames if config.rope_layout == "sequential" else 0
    return (*target, *range(start, start + source_frames))


def fused(device: torch.device) -> bool:
    """Whether rotations are handed to the fused kernels as angles; elsewhere cosines and sines are kept and reused."""
    return device.type == "cuda"


def attention_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    rotation: LayerRotation | LayerAngles,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything between the q/k/v projections and the attention: norm of q and k, rotation of all three.

    The two paths differ by rounding: the kernel rounds to the dtype of ``q`` once, Wan2.1 also before the weight.

    Args:
        q: ``[B, Nq, dim]`` of the first Nq tokens. k, v: ``[B, N, dim]``.
        weights: of the norms of q and k.
        rotation: angles take the fused kernel.
        heads: that ``dim`` is split into.
        eps: of the norms.

    Returns:
        q, k, v as ``[B, Nq or N, heads, head_dim]``.
    """
    if isinstance(rotation, LayerAngles):
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        phase_qk, phase_vo = rotation.phase_qk, rotation.phase_vo
        return qk_norm_rotary(q, k, v, *weights, rotation.position, phase_qk=phase_qk, phase_vo=phase_vo, eps=eps)
    q = norm_rotate(q, weights[0], eps, heads, rotation.qk[: q.shape[1]])
    k = norm_rotate(k, weights[1], eps, heads, rotation.qk)
    v = v.unflatten(-1, (heads, -1))
    return q, k, v if rotation.vo is None else rotate(v, rotation.vo.inverse())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate channel pairs of ``x`` ``[B, N, heads, head_dim]`` in float32 and return them in the dtype of ``x``."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.cos, rotation.sin
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, heads: int, rotation: Rotation) -> Tensor:
    """RMS-normalise ``x`` ``[B, N, dim]`` over all channels (all heads jointly), split heads and rotate.

    The norm and the rotation are computed in float32; the normalised value is rounded to the dtype of ``x`` before the
    weight is applied, as in Wan2.1. Returns ``[B, N, heads, head_dim]``.
    """
    return rotate((rms_norm(x, eps) * weight).unflatten(-1, (heads, -1)), rotation)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last axis by its root mean square, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
