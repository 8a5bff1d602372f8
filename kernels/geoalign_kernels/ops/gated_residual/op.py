"""``gated_residual``: public function, validation, registration.

Differentiable in all tensors; bitwise reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.registration import define
from geoalign_kernels.rows import check_vectors, vector_gradient, working_dtype

_HERE = "geoalign_kernels.ops.gated_residual"
for _name in ("gated_residual", "gated_residual_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y.

    Args:
        x: residual stream [B, S, D], any floating dtype; arithmetic in float32 (float64 for float64), one rounding.
        y: branch output, like x in shape.
        gate: [B or 1, D] or [D], any floating dtype.

    Returns:
        [B, S, D] in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    check_vectors(x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"y must be like x {list(x.shape)}, got {list(y.shape)}")
    return torch.ops.geoalign.gated_residual(x, y, gate)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(grad: Tensor, y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad, dtype=y.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate = inputs
    # y serves the gradient of the gate only; without it an empty tensor stands for its dtype.
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else y.new_empty(0), gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, gate = ctx.saved_tensors
    _, need_y, need_gate = ctx.needs_input_grad
    dy = torch.ops.geoalign.gated_residual_backward(grad, y, gate) if need_y else None
    dgate = None
    if need_gate:
        dtype = working_dtype(grad)
        dgate = vector_gradient(grad.to(dtype) * y.to(dtype), gate)
    return grad, dy, dgate


define(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
define("gated_residual_backward", "(Tensor grad, Tensor y, Tensor gate) -> Tensor", fake=_backward_fake)
