"""Definition of the attention prologue in plain torch: RMSNorm over all heads, then rotation of adjacent pairs.

Shapes: q [B, Sq, H, hd], k and v [B, S, H, hd] with Sq <= S (q belongs to the first Sq tokens), position [S, hd/2],
phases [B or 1, S, H or 1, P] on the last P pairs of every head. Arithmetic in float32 (float64 for float64 inputs), one
rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.angles import phase_gradient, rotate, rotation
from geoalign_kernels.rows import working_dtype

Prologue = tuple[Tensor, Tensor, Tensor]


def working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, or in float64 if the first one is float64."""
    dtype = working_dtype(tensors[0])
    return [t.to(dtype) for t in tensors]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean over heads and channels + eps): [B, S, 1, 1]."""
    return torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + eps)


def norm_rotate(x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """RMSNorm(x) * weight, rotated; in the dtype of x."""
    value, scale = working(x, weight)
    return rotate(value * inverse_rms(value, eps) * scale.view(x.shape[2:]), turn).to(x.dtype)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor,
    position: Tensor | None,
    phase_qk: Tensor | None,
    phase_vo: Tensor | None,
    eps: float,
) -> Prologue:
    """(q', k', v'); v' is empty if v is None."""
    q_out = norm_rotate(q, weight_q, rotation(position, phase_qk, q), eps)
    k_out = norm_rotate(k, weight_k, rotation(position, phase_qk, k), eps)
    if v is None:
        return q_out, k_out, q.new_empty(0)
    return q_out, k_out, rotate(working(v)[0], rotation(None, phase_vo, v), inverse=True).to(v.dtype)


def qk_norm_rotary_(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor,
    position: Tensor | None,
    phase_qk: Tensor | None,
    phase_vo: Tensor | None,
    eps: float,
) -> None:
    """The same in place."""
    results = qk_norm_rotary(q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps)
    for target, result in zip((q, k, v), results, strict=True):
        if target is not None:
            target.copy_(result)


def gradient_buffers(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    phase_qk: Tensor | None,
    phase_vo: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Room for the gradients of (q, k, v, weight_q, weight_k, phase_qk, phase_vo); what is not needed is empty.

    Weight gradients are in the working dtype. Those of phases are [B, S, H, P]: in the dtype of the phase, or in the
    working dtype if they are still to be summed over samples or heads.
    """
    dtype, shape = working_dtype(dk), dk.shape[:3]
    buffers = [g.new_empty(g.shape if need else 0) for g, need in zip((dq, dk, dv), needs[:3], strict=True)]
    for weight, need in zip((weight_q, weight_k), needs[3:5], strict=True):
        buffers.append(weight.new_zeros(weight.shape if need else 0, dtype=dtype))
    for phase, need in zip((phase_qk, phase_vo), needs[5:], strict=True):
        if phase is None or not need:
            buffers.append(dk.new_empty(0))
        else:
            summed = phase.shape[:3] != shape
            buffers.append(dk.new_empty((*shape, phase.shape[-1]), dtype=dtype if summed else phase.dtype))
    return buffers


def qk_norm_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor,
    position: Tensor | None,
    phase_qk: Tensor | None,
    phase_vo: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, weight_q, weight_k, phase_qk, phase_vo) as far as ``needs`` asks for each.

    ``v`` serves ``phase_vo`` alone and may be None without it.
    """
    out = gradient_buffers(dq, dk, dv, weight_q, weight_k, phase_qk, phase_vo, needs)
    pairs = phase_qk.shape[-1] if needs[5] and phase_qk is not None else 0
    turn_q, turn_k = (rotation(position, phase_qk, x) for x in (q, k))
    dangle_q = _norm_rotate_backward(dq, q, weight_q, turn_q, eps, pairs, out[0], out[3], needs[0], needs[3])
    dangle_k = _norm_rotate_backward(dk, k, weight_k, turn_k, eps, pairs, out[1], out[4], needs[1], needs[4])
    if pairs:
        dangle_k[:, : q.shape[1]] += dangle_q
        out[5].copy_(dangle_k)
    if needs[2] or needs[6]:
        turned = rotate(working(dv)[0], rotation(None, phase_vo, dv))
        if needs[2]:
            out[2].copy_(turned)
        if needs[6] and phase_vo is not None and v is not None:
            out[6].copy_(-phase_gradient(working(v)[0], turned, phase_vo.shape[-1]))
    return tuple(out)


def _norm_rotate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    eps: float,
    pairs: int,
    dx: Tensor,
    dweight: Tensor,
    need_x: bool,
    need_weight: bool,
) -> Tensor:
    """Fills dx and dweight if they are needed; returns the gradient of the last ``pairs`` angles."""
    if not (need_x or need_weight or pairs):
        return grad.new_empty(0)
    value, scale, dy = working(x, weight, grad)
    scale = scale.view(x.shape[2:])
    r = inverse_rms(value, eps)
    unit = value * r
    dz = rotate(dy, turn, inverse=True)
    if need_weight:
        dweight.copy_((dz * unit).sum(dim=(0, 1)).flatten())
    if need_x:
        dunit = dz * scale
        dx.copy_(r * (dunit - unit * (dunit * unit).mean(dim=(2, 3), keepdim=True)))
    return phase_gradient(unit * scale, dz, pairs) if pairs else grad.new_empty(0)
