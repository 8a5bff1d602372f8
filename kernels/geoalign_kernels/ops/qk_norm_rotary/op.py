"""``qk_norm_rotary``: everything between the q/k/v projections and the attention core in one pass.

Differentiable in q, k, v, both weights and both phases; not in the positions. Weight gradients are reduced in two
stages without atomics: bitwise reproducible per device and shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.angles import check_phase
from geoalign_kernels.ops.qk_norm_rotary import reference
from geoalign_kernels.registration import define

_HERE = "geoalign_kernels.ops.qk_norm_rotary"
for _name in ("qk_norm_rotary", "qk_norm_rotary_", "qk_norm_rotary_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    position: Tensor | None,
    *,
    phase_qk: Tensor | None = None,
    phase_vo: Tensor | None = None,
    eps: float = 1e-6,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention prologue of a rotary transformer with camera phases (ReDirector's RoCE).

        q' = rot(RMSNorm(q) * weight_q, position + phase_qk)        k' likewise        v' = rot(v, -phase_vo)

    The RMS is over all heads jointly (H * hd channels); rot turns the adjacent pairs (2i, 2i + 1) of a head. A phase
    acts on the last P pairs of each head, the others turn by the position alone. Without ``phase_vo``, v is returned as
    it is.

    Args:
        q: [B, Sq, H, hd], of the first Sq <= S tokens. k, v: [B, S, H, hd]. The last two dimensions are dense; a slice
            of a packed projection is taken without a copy. float32, bfloat16, float16 (float64 for checks).
        weight_q: [H * hd]. weight_k: likewise.
        position: rotary angles [S, hd/2] in radians, float32; |position + phase| < 8192.
        phase_qk: [B or 1, S, H or 1, P], float32 or bfloat16. phase_vo: likewise.
        eps: added to the mean square.
        inplace: overwrite q, k and v (rollout); refused when a gradient is needed.

    Returns:
        q', k', v' in the dtypes of q, k, v; rounded once from float32.

    Raises:
        ValueError: shapes do not fit, or ``inplace`` with gradients.
    """
    _check(q, k, v, weight_q, weight_k, position, phase_qk, phase_vo)
    rotated_v = None if phase_vo is None else v
    args = (q, k, rotated_v, weight_q, weight_k, position, phase_qk, phase_vo, eps)
    if inplace:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            raise ValueError("qk_norm_rotary(inplace=True) overwrites what its gradient needs; use it under no_grad")
        torch.ops.geoalign.qk_norm_rotary_(*args)
        return q, k, v
    q_out, k_out, v_out = torch.ops.geoalign.qk_norm_rotary(*args)
    return q_out, k_out, v if rotated_v is None else v_out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    position: Tensor | None,
    phase_qk: Tensor | None,
    phase_vo: Tensor | None,
) -> None:
    batch, tokens, heads, head = k.shape
    if v.shape != k.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != head or q.shape[1] > tokens or head % 2:
        raise ValueError(f"q, k, v must be [B, Sq<=S, H, hd], [B, S, H, hd] twice: {q.shape}, {k.shape}, {v.shape}")
    if weight_q.shape != (heads * head,) or weight_k.shape != (heads * head,):
        raise ValueError(f"RMSNorm weights must be [{heads * head}], got {weight_q.shape} and {weight_k.shape}")
    if position is not None and position.shape != (tokens, head // 2):
        raise ValueError(f"position must be [{tokens}, {head // 2}], got {list(position.shape)}")
    for name, phase in (("phase_qk", phase_qk), ("phase_vo", phase_vo)):
        check_phase(name, phase, (batch, tokens, heads, head))


def _fake(q: Tensor, k: Tensor, v: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), q.new_empty(0) if v is None else torch.empty_like(v)


def _backward_fake(dq: Tensor, dk: Tensor, dv: Tensor, *rest: Any) -> list[Tensor]:
    _, _, _, weight_q, weight_k, _, phase_qk, phase_vo, _, needs = rest
    return reference.gradient_buffers(dq, dk, dv, weight_q, weight_k, phase_qk, phase_vo, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, ctx.eps = inputs
    # Rotation needs no v on the way back; only the gradient of its phase does.
    kept = v if ctx.needs_input_grad[7] else None
    ctx.has_v = v is not None
    ctx.save_for_backward(q, k, kept, weight_q, weight_k, position, phase_qk, phase_vo)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    need_q, need_k, need_v, need_wq, need_wk, _, need_qk, need_vo, _ = ctx.needs_input_grad
    needs = [need_q, need_k, need_v and ctx.has_v, need_wq, need_wk, need_qk, need_vo and ctx.has_v]
    gradients = torch.ops.geoalign.qk_norm_rotary_backward(dq, dk, dv, *saved, ctx.eps, needs)
    dq_in, dk_in, dv_in, *rest = (g if need else None for g, need in zip(gradients, needs, strict=True))
    inputs = (saved[3], saved[4], saved[6], saved[7])
    dwq, dwk, dqk, dvo = (
        None if g is None else g.sum_to_size(x.shape).to(x.dtype) for g, x in zip(rest, inputs, strict=True)
    )
    return dq_in, dk_in, dv_in, dwq, dwk, None, dqk, dvo, None


_ARGUMENTS = (
    "Tensor weight_q, Tensor weight_k, Tensor? position, Tensor? phase_qk, Tensor? phase_vo, float eps"  # shared tail
)
define(
    "qk_norm_rotary",
    f"(Tensor q, Tensor k, Tensor? v, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "qk_norm_rotary_",
    f"(Tensor(a!) q, Tensor(b!) k, Tensor(c!)? v, {_ARGUMENTS}) -> ()",
    fake=lambda *_: None,
)
define(
    "qk_norm_rotary_backward",
    f"(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor? v, {_ARGUMENTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
