"""Definition of the attention prologue in plain torch: RMSNorm over all heads, then rotation of adjacent pairs.

Shapes: q [B, Sq, H, hd], k and v [B, S, H, hd] with Sq <= S (q belongs to the first Sq tokens), position [S, hd/2],
phases [B or 1, S, H or 1, P] on the last P pairs of every head. Arithmetic in float32 (float64 for float64 inputs), one
rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

Prologue = tuple[Tensor, Tensor, Tensor]


def working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, or in float64 if the first one is float64."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.to(dtype) for t in tensors]


def rotation(position: Tensor | None, phase: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of position + phase, broadcastable to [B, S, H, hd/2]; None if there is nothing to rotate by."""
    if position is None and phase is None:
        return None
    dtype = torch.promote_types(like.dtype, torch.float32)
    tokens, pairs = like.shape[1], like.shape[-1] // 2
    angle = torch.zeros(1, tokens, 1, pairs, dtype=dtype, device=like.device)
    if position is not None:
        angle = angle + position[:tokens, None].to(dtype)
    if phase is not None:
        phase = phase[:, :tokens].to(dtype)
        angle = angle + torch.nn.functional.pad(phase, (pairs - phase.shape[-1], 0))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor] | None, *, inverse: bool = False) -> Tensor:
    """Multiplies the adjacent pairs of x [B, S, H, hd] by exp(i angle), or by its inverse."""
    if turn is None:
        return x
    cosine, sine = turn
    if inverse:
        sine = -sine
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1).flatten(-2)


def phase_gradient(x: Tensor, grad: Tensor, pairs: int) -> Tensor:
    """d loss / d angle = Im(conj(x) grad) of the last `pairs` pairs; the same before and after a common rotation."""
    x_real, x_imaginary = x.unflatten(-1, (-1, 2))[..., -pairs:, :].unbind(-1)
    g_real, g_imaginary = grad.unflatten(-1, (-1, 2))[..., -pairs:, :].unbind(-1)
    return x_real * g_imaginary - x_imaginary * g_real


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
    need_weight: bool,
    need_phase: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dweight_q, dweight_k, dphase_qk, dphase_vo).

    Weight and phase gradients are in the working dtype, the latter [B, S, H, P]; what was not asked for is empty.
    """
    pairs = 0 if phase_qk is None else phase_qk.shape[-1]
    dq_in, dweight_q, dangle_q = _norm_rotate_backward(dq, q, weight_q, rotation(position, phase_qk, q), eps, pairs)
    dk_in, dweight_k, dangle_k = _norm_rotate_backward(dk, k, weight_k, rotation(position, phase_qk, k), eps, pairs)
    empty = dweight_q.new_empty(0)
    if not need_weight:
        dweight_q = dweight_k = empty
    dphase_qk = dphase_vo = empty
    if need_phase and phase_qk is not None:
        dphase_qk = dangle_k
        dphase_qk[:, : q.shape[1]] += dangle_q
    dv_in = dv.new_empty(0)
    if v is not None:
        value, grad = working(v, dv)
        turned = rotate(grad, rotation(None, phase_vo, v))
        dv_in = turned.to(v.dtype)
        if need_phase and phase_vo is not None:
            dphase_vo = -phase_gradient(value, turned, phase_vo.shape[-1])
    return dq_in, dk_in, dv_in, dweight_q, dweight_k, dphase_qk, dphase_vo


def _norm_rotate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor] | None, eps: float, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    value, scale, dy = working(x, weight, grad)
    scale = scale.view(x.shape[2:])
    r = inverse_rms(value, eps)
    unit = value * r
    dz = rotate(dy, turn, inverse=True)
    dangle = phase_gradient(unit * scale, dz, pairs) if pairs else dz.new_empty(0)
    dunit = dz * scale
    dx = r * (dunit - unit * (dunit * unit).mean(dim=(2, 3), keepdim=True))
    return dx.to(x.dtype), (dz * unit).sum(dim=(0, 1)).flatten(), dangle
