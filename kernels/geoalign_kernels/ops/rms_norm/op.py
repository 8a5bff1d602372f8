"""``rms_norm``: public function, validation, registration. Differentiable in x and weight; bitwise reproducible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.ops.rms_norm import reference
from geoalign_kernels.registration import define

_HERE = "geoalign_kernels.ops.rms_norm"
for _name in ("rms_norm", "rms_norm_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The query and key norm of a cross-attention, which has neither positions nor phases (``qk_norm_rotary`` has both).

    Args:
        x: [B, S, D], all heads side by side, any floating dtype; arithmetic in float32 (float64 for float64), one
            rounding at the end. Rows may be strided, channels dense.
        weight: [D], any floating dtype. Where it needs no gradient, the backward neither computes nor stores one.
        eps: added to the mean square.

    Returns:
        [B, S, D] in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 3 or weight.shape != x.shape[2:]:
        raise ValueError(f"x must be [B, S, D] and weight [D], got {list(x.shape)} and {list(weight.shape)}")
    return torch.ops.geoalign.rms_norm(x, weight, eps)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return reference.gradient_buffers(grad, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    dx, dweight = torch.ops.geoalign.rms_norm_backward(grad, x, weight, ctx.eps, needs)
    return dx if needs[0] else None, dweight.to(weight.dtype) if needs[1] else None, None


define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, float eps, bool[] needs) -> (Tensor, Tensor)",
    fake=_backward_fake,
)
