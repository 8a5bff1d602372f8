"""``modulated_norm``: public function, validation, registration.

Differentiable in all tensors. The kernel computes dx; gradients of scale and shift, which are frozen when only
self-attention is trained, are plain torch reductions that run only if asked for. Bitwise reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.registration import define
from geoalign_kernels.rows import check_vectors, normalised, vector_gradient, working_dtype

_HERE = "geoalign_kernels.ops.modulated_norm"
for _name in ("modulated_norm", "modulated_norm_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift over the last dimension; an affine LayerNorm is scale = weight - 1.

    Args:
        x: [B, S, D], any floating dtype; arithmetic in float32 (float64 for float64), one rounding at the end.
        scale: [B or 1, D] or [D], any floating dtype. shift: likewise.
        eps: added to the variance.
        dtype: of the result, default that of x. A float32 residual stream whose norm feeds a bfloat16 product asks for
            bfloat16 here and saves a pass over the norm.

    Returns:
        [B, S, D] in ``dtype``.

    Raises:
        ValueError: shapes do not fit.
    """
    check_vectors(x, scale=scale, shift=shift)
    return torch.ops.geoalign.modulated_norm(x, scale, shift, eps, dtype)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _backward_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, shift = ctx.saved_tensors
    need_x, need_scale, need_shift = ctx.needs_input_grad[:3]
    dx = torch.ops.geoalign.modulated_norm_backward(grad, x, scale, ctx.eps) if need_x else None
    dscale = dshift = None
    if need_scale:
        unit, _ = normalised(x, ctx.eps)
        dscale = vector_gradient(grad.to(unit) * unit, scale)
    if need_shift:
        dshift = vector_gradient(grad.to(working_dtype(x)), shift)
    return dx, dscale, dshift, None, None


define(
    "modulated_norm",
    "(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType? dtype) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
define("modulated_norm_backward", "(Tensor grad, Tensor x, Tensor scale, float eps) -> Tensor", fake=_backward_fake)
