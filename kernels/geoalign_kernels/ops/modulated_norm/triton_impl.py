"""Triton kernels of ``modulated_norm``: a few tokens per program, the row stays in registers, read and written once.

Shapes in the bodies: R rows and C columns of a chunk; a row is a tuple of chunks ``[R, C]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.triton_rows import (
    dense,
    dense_rows,
    load_rows,
    load_vector,
    norm_gradient,
    plan_rows,
    row_covariance,
    row_mean,
    row_strides,
    row_tile,
    store_chunk,
    vector_stride,
)


@triton.jit
def forward_kernel(
    X, Scale, Shift, Out, x_strides, scale_stride, shift_stride, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    x = load_rows(X, b, s, ok, x_strides, CHUNK, CHUNKS)
    mean = row_mean(x, WIDTH)  # [R, 1]
    inverse = tl.rsqrt(row_covariance(x, mean, x, mean, WIDTH) + eps)
    for c in tl.static_range(CHUNKS):
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)  # [R, C]
        shift = load_vector(Shift + b * shift_stride, c, ROWS, CHUNK)
        out = (x[c] - mean) * inverse * (1.0 + scale) + shift
        store_chunk(Out, out, b, s, ok, dense(tokens, WIDTH), c, CHUNK)


@triton.jit
def backward_kernel(
    Grad, X, Scale, DX, grad_strides, x_strides, scale_stride, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    x = load_rows(X, b, s, ok, x_strides, CHUNK, CHUNKS)
    dx = norm_gradient(Grad, x, Scale, b, s, ok, grad_strides, scale_stride, eps, WIDTH, ROWS, CHUNK, CHUNKS)
    for c in tl.static_range(CHUNKS):
        store_chunk(DX, dx[c], b, s, ok, dense(tokens, WIDTH), c, CHUNK)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """See ``reference.modulated_norm``."""
    plan = plan_rows(x.shape[2])
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        x, scale, shift = dense_rows(x), scale.contiguous(), shift.contiguous()
        forward_kernel[plan.grid(x.shape[1], x.shape[0])](
            x, scale, shift, out, row_strides(x), vector_stride(scale), vector_stride(shift), x.shape[1], eps,
            **plan.constants,
        )  # fmt: skip
    return out


def modulated_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See ``reference.modulated_norm_backward``."""
    plan = plan_rows(x.shape[2])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        grad, x, scale = dense_rows(grad), dense_rows(x), scale.contiguous()
        backward_kernel[plan.grid(x.shape[1], x.shape[0])](
            grad, x, scale, dx, row_strides(grad), row_strides(x), vector_stride(scale), x.shape[1], eps,
            **plan.constants,
        )  # fmt: skip
    return dx
