"""Triton kernels of ``unrotate_gate_norm``: reads y, x and the phases once, writes the residual stream and its norm.

Shapes in the bodies: R rows and C columns of a chunk; a row is a tuple of chunks ``[R, C]``, its angles one of
``[R, C/2]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from geoalign_kernels.ops.unrotate_gate_norm.reference import gradient_buffers
from geoalign_kernels.triton_angles import cross_pairs, load_turn, phase_operand, phase_vector, rotate, store_angles
from geoalign_kernels.triton_rows import (
    dense,
    dense_rows,
    load_chunk,
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
    Y, X, Gate, Scale, Shift, Phase, Stream, Normed, y_strides, x_strides, phase_strides,
    gate_stride, scale_stride, shift_stride, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    row = ()
    for c in tl.static_range(CHUNKS):
        if Phase is not None:
            sine, cosine = load_turn(Phase, b, s, ok, c, 1.0, phase_strides, HEAD, PAIRS, CHUNK, VECTOR)
        y = load_chunk(Y, b, s, ok, y_strides, c, CHUNK)  # [R, C]
        if Phase is not None:
            y = rotate(y, cosine, sine, ROWS, CHUNK)
        stream = load_chunk(X, b, s, ok, x_strides, c, CHUNK)
        stream += load_vector(Gate + b * gate_stride, c, ROWS, CHUNK) * y
        # The norm reads what is stored, not what was computed.
        stream = stream.to(Stream.dtype.element_ty).to(tl.float32)
        store_chunk(Stream, stream, b, s, ok, dense(tokens, WIDTH), c, CHUNK)
        row = row + (stream,)  # noqa: RUF005
    mean = row_mean(row, WIDTH)  # [R, 1]
    inverse = tl.rsqrt(row_covariance(row, mean, row, mean, WIDTH) + eps)
    for c in tl.static_range(CHUNKS):
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        shift = load_vector(Shift + b * shift_stride, c, ROWS, CHUNK)
        out = (row[c] - mean) * inverse * (1.0 + scale) + shift
        store_chunk(Normed, out, b, s, ok, dense(tokens, WIDTH), c, CHUNK)


@triton.jit
def backward_kernel(
    DStream, DNormed, Y, Stream, Gate, Scale, Phase, DX, DY, DPhase,
    dstream_strides, dnormed_strides, y_strides, phase_strides, gate_stride, scale_stride, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    row = load_rows(Stream, b, s, ok, dense(tokens, WIDTH), CHUNK, CHUNKS)
    through = norm_gradient(
        DNormed, row, Scale, b, s, ok, dnormed_strides, scale_stride, eps, WIDTH, ROWS, CHUNK, CHUNKS
    )
    dangles = ()
    for c in tl.static_range(CHUNKS):
        if Phase is not None:
            sine, cosine = load_turn(Phase, b, s, ok, c, 1.0, phase_strides, HEAD, PAIRS, CHUNK, VECTOR)
        dx = load_chunk(DStream, b, s, ok, dstream_strides, c, CHUNK) + through[c]
        if DX is not None:
            store_chunk(DX, dx, b, s, ok, dense(tokens, WIDTH), c, CHUNK)
        dy = load_vector(Gate + b * gate_stride, c, ROWS, CHUNK) * dx
        if Phase is not None:
            dy = rotate(dy, cosine, -sine, ROWS, CHUNK)
        if DY is not None:
            store_chunk(DY, dy, b, s, ok, dense(tokens, WIDTH), c, CHUNK)
        if DPhase is not None:
            y = load_chunk(Y, b, s, ok, y_strides, c, CHUNK)
            dangles = dangles + (cross_pairs(y, dy, ROWS, CHUNK),)  # noqa: RUF005
    if DPhase is not None:
        store_angles(DPhase, dangles, b, s, ok, tokens, 1.0, WIDTH // HEAD, HEAD, PAIRS, CHUNK, CHUNKS)


def unrotate_gate_norm(y, x, gate, scale, shift, phase, heads, eps, dtype):
    """See ``reference.unrotate_gate_norm``."""
    batch, tokens, width = x.shape
    plan = plan_rows(width, multiple_of=width // heads if phase is not None else 2)
    stream = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(stream, dtype=dtype)
    if x.numel() > 0:
        y, x = dense_rows(y), dense_rows(x)
        gate, scale, shift = gate.contiguous(), scale.contiguous(), shift.contiguous()
        phase, phase_strides, pairs = phase_operand(phase)
        forward_kernel[plan.grid(tokens, batch)](
            y, x, gate, scale, shift, phase, stream, normed, row_strides(y), row_strides(x), phase_strides,
            vector_stride(gate), vector_stride(scale), vector_stride(shift), tokens, eps,
            HEAD=width // heads, PAIRS=pairs, VECTOR=phase_vector(phase), **plan.constants,
        )  # fmt: skip
    return stream, normed


def unrotate_gate_norm_backward(dstream, dnormed, y, stream, gate, scale, phase, heads, eps, needs):
    """See ``reference.unrotate_gate_norm_backward``."""
    batch, tokens, width = stream.shape
    plan = plan_rows(width, multiple_of=width // heads if phase is not None else 2)
    dx, dy, dphase = gradient_buffers(y, stream, phase, heads, needs)
    if stream.numel() > 0 and any(needs):
        dstream, dnormed = dense_rows(dstream), dense_rows(dnormed)
        y = dense_rows(y) if needs[2] else None
        gate, scale = gate.contiguous(), scale.contiguous()
        phase, phase_strides, pairs = phase_operand(phase)
        backward_kernel[plan.grid(tokens, batch)](
            dstream, dnormed, y, stream.contiguous(), gate, scale, phase,
            *(wanted if need else None for wanted, need in zip((dx, dy, dphase), needs, strict=True)),
            row_strides(dstream), row_strides(dnormed), row_strides(y), phase_strides,
            vector_stride(gate), vector_stride(scale), tokens, eps,
            HEAD=width // heads, PAIRS=pairs, VECTOR=phase_vector(phase), **plan.constants,
        )  # fmt: skip
    return dx, dy, dphase
