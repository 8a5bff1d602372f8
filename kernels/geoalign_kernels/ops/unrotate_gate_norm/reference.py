"""Definition of the attention epilogue in plain torch, any floating dtype.

Both results are rounded once; the norm reads the rounded residual stream, so that it equals a separate norm of what is
stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.angles import phase_gradient, rotate, rotation
from geoalign_kernels.rows import modulated, norm_gradient, per_sample, working_dtype


def turned(y: Tensor, phase: Tensor | None, heads: int, *, inverse: bool = False) -> Tensor:
    """y [B, S, H * hd] in the working dtype with the last pairs of every head turned by ``phase``."""
    value = y.to(working_dtype(y)).unflatten(-1, (heads, -1))
    return rotate(value, rotation(None, phase, value), inverse=inverse).flatten(2)


def unrotate_gate_norm(
    y: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    phase: Tensor | None,
    heads: int,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(x + gate * rot(y, phase) in the dtype of x, its modulated norm in ``dtype``)."""
    working = working_dtype(x)
    branch = turned(y, phase, heads).to(working)
    stream = (x.to(working) + per_sample(gate, working) * branch).to(x.dtype)
    return stream, modulated(stream, scale, shift, eps).to(dtype or x.dtype)


def gradient_buffers(
    y: Tensor, stream: Tensor, phase: Tensor | None, heads: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (dx, dy in the dtype of y, dphase [B, S, H, P]); what is not needed is empty.

    dphase is in the dtype of the phase, or in the working dtype if it is still to be summed over samples or heads.
    """
    dx, dy = stream.new_empty(stream.shape if needs[0] else 0), y.new_empty(stream.shape if needs[1] else 0)
    if phase is None or not needs[2]:
        return dx, dy, y.new_empty(0)
    shape = (*stream.shape[:2], heads, phase.shape[-1])
    return dx, dy, y.new_empty(shape, dtype=phase.dtype if phase.shape == shape else working_dtype(y))


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
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dphase) as far as ``needs`` asks for each; y may be empty where dphase is not needed."""
    dx, dy, dphase = gradient_buffers(y, stream, phase, heads, needs)
    through_norm = norm_gradient(dnormed, stream, scale, eps)
    total = dstream.to(through_norm) + through_norm
    if needs[0]:
        dx.copy_(total)
    if needs[1] or needs[2]:
        dbranch = turned(per_sample(gate, total.dtype) * total, phase, heads, inverse=True)
        if needs[1]:
            dy.copy_(dbranch)
        if needs[2] and phase is not None:
            branch, grad = (t.to(total).unflatten(-1, (heads, -1)) for t in (y, dbranch))
            dphase.copy_(phase_gradient(branch, grad, phase.shape[-1]))
    return dx, dy, dphase
