"""Triton kernels of ``rms_norm``: one read, one write; the weight gradient in two stages without atomics.

Shapes in the bodies: R rows and C columns of a chunk; a row is a tuple of chunks ``[R, C]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.ops.rms_norm.reference import gradient_buffers
from geoalign_kernels.triton_rows import (
    dense,
    dense_rows,
    load_rows,
    load_vector,
    norm_backward,
    plan_rows,
    row_covariance,
    row_strides,
    row_tile,
    store_chunk,
    store_vector_sum,
    zero_tiles,
)

STEPS = 16  # token tiles per program where a weight gradient is summed: one partial sum each


@triton.jit
def forward_kernel(
    X, Weight, Out, x_strides, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    x = load_rows(X, b, s, ok, x_strides, CHUNK, CHUNKS)
    inverse = tl.rsqrt(row_covariance(x, 0.0, x, 0.0, WIDTH) + eps)  # [R, 1]
    for c in tl.static_range(CHUNKS):
        out = x[c] * inverse * load_vector(Weight, c, ROWS, CHUNK)  # [R, C]
        store_chunk(Out, out, b, s, ok, dense(tokens, WIDTH), c, CHUNK)


@triton.jit
def backward_kernel(
    Grad, X, DX, Weight, DWeight, grad_strides, x_strides, tokens, eps, STEPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    total = zero_tiles(DWeight is not None, ROWS, CHUNK, CHUNKS)  # chunks [R, C]
    for step in range(STEPS):
        s = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        total, _ = norm_backward(
            Grad, X, DX, Weight, total, (), (), b, s, s < tokens, grad_strides, x_strides, dense(tokens, WIDTH), eps,
            DWeight is not None, False, WIDTH, ROWS, CHUNK, CHUNKS,
        )  # fmt: skip
    if DWeight is not None:
        store_vector_sum(DWeight, total, b, WIDTH, CHUNK, CHUNKS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    plan = plan_rows(x.shape[2])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        x = dense_rows(x)
        forward_kernel[plan.grid(x.shape[1], x.shape[0])](
            x, weight.contiguous(), out, row_strides(x), x.shape[1], eps, **plan.constants
        )
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """See ``reference.rms_norm_backward``; partial weight gradients are summed in a fixed order."""
    batch, tokens, width = x.shape
    plan, steps = plan_rows(width), STEPS if needs[1] else 1
    dx, dweight = gradient_buffers(grad, weight, needs)
    if x.numel() > 0:
        grid = plan.grid(triton.cdiv(tokens, steps), batch)
        partial = dweight.new_empty(grid[0] * batch, width) if needs[1] else None
        grad, x = dense_rows(grad), dense_rows(x)
        backward_kernel[grid](
            grad, x, dx if needs[0] else None, weight.contiguous(), partial, row_strides(grad), row_strides(x), tokens,
            eps, STEPS=steps, **plan.constants,
        )  # fmt: skip
        if partial is not None:
            torch.sum(partial, 0, out=dweight)
    return dx, dweight
