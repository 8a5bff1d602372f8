"""Triton kernel of ``gated_residual``: one streaming pass; without the residual it is the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.triton_rows import (
    dense,
    dense_rows,
    load_chunk,
    load_vector,
    plan_rows,
    row_strides,
    row_tile,
    store_chunk,
    vector_stride,
)


@triton.jit
def gate_kernel(
    X, Y, Gate, Out, x_strides, y_strides, gate_stride, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)
    for c in tl.static_range(CHUNKS):
        out = load_chunk(Y, b, s, ok, y_strides, c, CHUNK) * load_vector(Gate + b * gate_stride, c, ROWS, CHUNK)
        if X is not None:
            out += load_chunk(X, b, s, ok, x_strides, c, CHUNK)
        store_chunk(Out, out, b, s, ok, dense(tokens, WIDTH), c, CHUNK)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See ``reference.gated_residual``."""
    return _launch(dense_rows(x), y, gate, torch.empty_like(x, memory_format=torch.contiguous_format))


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See ``reference.gated_residual_backward``."""
    return _launch(None, grad, gate, torch.empty_like(grad, dtype=y.dtype, memory_format=torch.contiguous_format))


def _launch(x: Tensor | None, y: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    plan = plan_rows(out.shape[2])
    if out.numel() > 0:
        y, gate = dense_rows(y), gate.contiguous()
        gate_kernel[plan.grid(out.shape[1], out.shape[0])](
            x, y, gate, out, row_strides(x), row_strides(y), vector_stride(gate), out.shape[1], **plan.constants
        )
    return out
