"""Triton kernels of `modulated_norm`: a few tokens per program, the row stays in registers, one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.triton_common import dense_rows, load_vector, plan_rows, row_strides, vector_stride

ROWS = 4


@triton.jit
def forward_kernel(
    X, Scale, Shift, Out, x_strides, scale_stride, shift_stride, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (s < tokens)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    row, total = (), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = b * x_strides[0] + s[:, None] * x_strides[1] + c * CHUNK + columns
        row = row + (tl.load(X + at, mask=ok, other=0.0).to(tl.float32),)  # noqa: RUF005
        total += row[c]
    mean = (tl.sum(total, 1) / WIDTH)[:, None]
    square = tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        square += (row[c] - mean) * (row[c] - mean)
    inverse = tl.rsqrt(tl.sum(square, 1) / WIDTH + eps)[:, None]
    for c in tl.static_range(CHUNKS):
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        shift = load_vector(Shift + b * shift_stride, c, ROWS, CHUNK)
        out = (row[c] - mean) * inverse * (1.0 + scale) + shift
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=ok)


@triton.jit
def backward_kernel(
    Grad, X, Scale, DX, grad_strides, x_strides, scale_stride, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (s < tokens)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    row, grads = (), ()
    total, grad_total = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = b * x_strides[0] + s[:, None] * x_strides[1] + c * CHUNK + columns
        row = row + (tl.load(X + at, mask=ok, other=0.0).to(tl.float32),)  # noqa: RUF005
        at = b * grad_strides[0] + s[:, None] * grad_strides[1] + c * CHUNK + columns
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        grads = grads + (tl.load(Grad + at, mask=ok, other=0.0).to(tl.float32) * (1.0 + scale),)  # noqa: RUF005
        total += row[c]
        grad_total += grads[c]
    mean, grad_mean = (tl.sum(total, 1) / WIDTH)[:, None], (tl.sum(grad_total, 1) / WIDTH)[:, None]
    square, cross = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        square += (row[c] - mean) * (row[c] - mean)
        cross += (row[c] - mean) * grads[c]
    inverse = tl.rsqrt(tl.sum(square, 1) / WIDTH + eps)[:, None]
    slope = (tl.sum(cross, 1) / WIDTH)[:, None] * inverse * inverse
    for c in tl.static_range(CHUNKS):
        dx = inverse * (grads[c] - grad_mean - (row[c] - mean) * slope)
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """See `reference.modulated_norm`."""
    batch, tokens, width = x.shape
    plan = plan_rows(width, ROWS)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        x, scale, shift = dense_rows(x), scale.contiguous(), shift.contiguous()
        forward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            x, scale, shift, out, row_strides(x), vector_stride(scale), vector_stride(shift), tokens, eps,
            WIDTH=width, ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, num_warps=plan.warps,
        )  # fmt: skip
    return out


def modulated_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See `reference.modulated_norm_backward`."""
    batch, tokens, width = x.shape
    plan = plan_rows(width, ROWS)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        grad, x, scale = dense_rows(grad), dense_rows(x), scale.contiguous()
        backward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            grad, x, scale, dx, row_strides(grad), row_strides(x), vector_stride(scale), tokens, eps,
            WIDTH=width, ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, num_warps=plan.warps,
        )  # fmt: skip
    return dx
