"""Definition of the attention epilogue in plain torch, any floating dtype.

Both results are rounded once; the norm reads the rounded residual stream, so that it equals a separate norm of what is
stored.
"""

from __future__ import annotations

from torch import Tensor

from geoalign_kernels.ops.modulated_norm.reference import (
    modulated_norm,
    norm_gradient,
    normalised,
    per_sample,
    working_dtype,
)
from geoalign_kernels.ops.qk_norm_rotary.reference import phase_gradient, rotate, rotation


def turned(y: Tensor, phase: Tensor | None, heads: int, *, inverse: bool = False) -> Tensor:
    """y [B, S, H * hd] in the working dtype with the last pairs of every head turned by `phase`."""
    value = y.to(working_dtype(y)).unflatten(-1, (heads, -1))
    return rotate(value, rotation(None, phase, value), inverse=inverse).flatten(2)


def unrotate_gate_norm(
    y: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, phase: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * rot(y, phase), its modulated norm), both in the dtype of x."""
    dtype = working_dtype(x)
    branch = turned(y, phase, heads).to(dtype)
    stream = (x.to(dtype) + per_sample(gate, dtype) * branch).to(x.dtype)
    return stream, modulated_norm(stream, scale, shift, eps)


def unrotate_gate_norm_backward(
    dstream: Tensor,
    dnormed: Tensor,
    y: Tensor,
    stream: Tensor,
    gate: Tensor,
    scale: Tensor,
    phase: Tensor | None,
    heads: int,
    eps: float,
    need_phase: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dphase); dphase is [B, S, H, P] in the working dtype, empty if not asked for."""
    unit, inverse = normalised(stream, eps)
    through_norm = norm_gradient(dnormed.to(unit) * (1.0 + per_sample(scale, unit.dtype)), unit, inverse)
    total = dstream.to(unit) + through_norm
    dy = turned(per_sample(gate, unit.dtype) * total, phase, heads, inverse=True)
    dphase = dy.new_empty(0)
    if need_phase and phase is not None:
        value = y.to(dy).unflatten(-1, (heads, -1))
        dphase = phase_gradient(value, dy.unflatten(-1, (heads, -1)), phase.shape[-1])
    return total.to(stream.dtype), dy.to(y.dtype), dphase
