"""Triton kernel of `gated_residual`: one streaming pass; without the residual it is the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.triton_common import dense_rows, load_vector, plan_rows, row_strides, vector_stride

ROWS = 4


@triton.jit
def gate_kernel(
    X, Y, Gate, Out, x_strides, y_strides, gate_stride, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (s < tokens)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    for c in tl.static_range(CHUNKS):
        at = b * y_strides[0] + s[:, None] * y_strides[1] + c * CHUNK + columns
        out = tl.load(Y + at, mask=ok).to(tl.float32) * load_vector(Gate + b * gate_stride, c, ROWS, CHUNK)
        if X is not None:
            at = b * x_strides[0] + s[:, None] * x_strides[1] + c * CHUNK + columns
            out += tl.load(X + at, mask=ok).to(tl.float32)
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=ok)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `reference.gated_residual`."""
    return _launch(dense_rows(x), y, gate, torch.empty_like(x, memory_format=torch.contiguous_format))


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `reference.gated_residual_backward`."""
    return _launch(None, grad, gate, torch.empty_like(y, memory_format=torch.contiguous_format))


def _launch(x: Tensor | None, y: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    batch, tokens, width = out.shape
    plan = plan_rows(width, ROWS)
    if out.numel() > 0:
        y, gate = dense_rows(y), gate.contiguous()
        gate_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            x, y, gate, out, row_strides(x), row_strides(y), vector_stride(gate), tokens,
            WIDTH=width, ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, num_warps=plan.warps,
        )  # fmt: skip
    return out
