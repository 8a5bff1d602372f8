"""``unrotate_gate_norm``: public function, validation, registration.

Differentiable in all tensors. The kernel computes dx, dy and dphase; gradients of gate, scale and shift are plain torch
reductions that run only if asked for. Bitwise reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.angles import check_phase
from geoalign_kernels.ops.unrotate_gate_norm import reference
from geoalign_kernels.registration import define
from geoalign_kernels.rows import check_vectors, normalised, vector_gradient, working_dtype

_HERE = "geoalign_kernels.ops.unrotate_gate_norm"
for _name in ("unrotate_gate_norm", "unrotate_gate_norm_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


def unrotate_gate_norm(
    y: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    phase: Tensor | None = None,
    heads: int = 1,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Everything between the attention's output projection and the next projection.

        x' = x + gate * rot(y, +phase)        u = LayerNorm(x') * (1 + scale) + shift

    rot turns the adjacent pairs of y, seen as [B, S, heads, hd], by the camera phase of the token: in ReDirector it
    follows the output projection. Without ``phase`` this is the gated residual fused with the norm that comes after it.
    For an affine LayerNorm pass scale = weight - 1, shift = bias.

    Args:
        y: projected attention output [B, S, D], any floating dtype; arithmetic in float32 (float64 for float64).
        x: residual stream, like y in shape.
        gate: [B or 1, D] or [D]. scale: likewise. shift: likewise.
        phase: [B or 1, S, heads or 1, P], on the last P pairs of every head; |phase| < 8192.
        heads: number of heads that D = heads * hd is split into for the rotation.
        eps: added to the variance.
        dtype: of u, default that of x.

    Returns:
        (x', u), both [B, S, D], x' in the dtype of x; u is the norm of the stored (rounded) x'.

    Raises:
        ValueError: shapes do not fit.
    """
    check_vectors(x, gate=gate, scale=scale, shift=shift)
    batch, tokens, width = x.shape
    if y.shape != x.shape or width % (2 * heads):
        raise ValueError(f"y must be like x {list(x.shape)} and split into {heads} heads of pairs, got {list(y.shape)}")
    check_phase("phase", phase, (batch, tokens, heads, width // heads))
    return torch.ops.geoalign.unrotate_gate_norm(y, x, gate, scale, shift, phase, heads, eps, dtype)


def _fake(y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=rest[-1])


def _backward_fake(dstream: Tensor, dnormed: Tensor, y: Tensor, stream: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, phase, heads, _, needs = rest
    return reference.gradient_buffers(y, stream, phase, heads, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, _, gate, scale, shift, phase, ctx.heads, ctx.eps, _ = inputs
    # y serves the gradients of the phase and the gate only; without them an empty tensor stands for its dtype.
    kept = y if ctx.needs_input_grad[5] or ctx.needs_input_grad[2] else y.new_empty(0)
    ctx.save_for_backward(kept, output[0], gate, scale, shift, phase)


def _backward(ctx: Any, dstream: Tensor, dnormed: Tensor) -> tuple[Any, ...]:
    y, stream, gate, scale, shift, phase = ctx.saved_tensors
    need_y, need_x, need_gate, need_scale, need_shift, need_phase, *_ = ctx.needs_input_grad
    needs = [need_x or need_gate, need_y, need_phase]
    dx = dy = dphase = dgate = dscale = dshift = None
    if any(needs):
        found = torch.ops.geoalign.unrotate_gate_norm_backward(
            dstream, dnormed, y, stream, gate, scale, phase, ctx.heads, ctx.eps, needs
        )
        dx, dy, dphase = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    if dx is not None and need_gate:
        dgate = vector_gradient(dx * reference.turned(y, phase, ctx.heads), gate)
    if need_scale:
        unit, _ = normalised(stream, ctx.eps)
        dscale = vector_gradient(dnormed.to(unit) * unit, scale)
    if need_shift:
        dshift = vector_gradient(dnormed.to(working_dtype(dnormed)), shift)
    if dphase is not None:
        dphase = dphase.sum_to_size(phase.shape).to(phase.dtype)
    return dy, dx if need_x else None, dgate, dscale, dshift, dphase, None, None, None


define(
    "unrotate_gate_norm",
    "(Tensor y, Tensor x, Tensor gate, Tensor scale, Tensor shift, Tensor? phase, int heads, float eps, "
    "ScalarType? dtype) -> (Tensor, Tensor)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "unrotate_gate_norm_backward",
    "(Tensor dstream, Tensor dnormed, Tensor y, Tensor stream, Tensor gate, Tensor scale, Tensor? phase, int heads, "
    "float eps, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
