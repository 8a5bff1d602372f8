"""Triton kernels of `unrotate_gate_norm`: reads y, x and the phases once, writes the residual stream and its norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from geoalign_kernels.triton_common import (
    cross_pairs,
    dense_rows,
    load_angle,
    load_vector,
    phase_operand,
    phase_vector,
    plan_rows,
    rotate,
    row_strides,
    sincos,
    store_angles,
    vector_stride,
)

ROWS = 2


@triton.jit
def forward_kernel(
    Y, X, Gate, Scale, Shift, Phase, Stream, Normed, y_strides, x_strides, phase_strides,
    gate_stride, scale_stride, shift_stride, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_ok = s < tokens
    ok = rows_ok[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    row, total = (), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = b * y_strides[0] + s[:, None] * y_strides[1] + c * CHUNK + columns
        y = tl.load(Y + at, mask=ok, other=0.0).to(tl.float32)
        if Phase is not None:
            angle = load_angle(None, Phase, b, s, rows_ok, c, 1.0, phase_strides, HEAD, PAIRS, CHUNK, VECTOR)
            sine, cosine = sincos(angle)
            y = rotate(y, cosine, sine, ROWS, CHUNK)
        at = b * x_strides[0] + s[:, None] * x_strides[1] + c * CHUNK + columns
        stream = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
        stream += load_vector(Gate + b * gate_stride, c, ROWS, CHUNK) * y
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        stored = stream.to(Stream.dtype.element_ty)
        tl.store(Stream + at, stored, mask=ok)
        row = row + (stored.to(tl.float32),)  # noqa: RUF005
        total += row[c]
    mean = (tl.sum(total, 1) / WIDTH)[:, None]
    square = tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        square += (row[c] - mean) * (row[c] - mean)
    inverse = tl.rsqrt(tl.sum(square, 1) / WIDTH + eps)[:, None]
    for c in tl.static_range(CHUNKS):
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        shift = load_vector(Shift + b * shift_stride, c, ROWS, CHUNK)
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        tl.store(Normed + at, ((row[c] - mean) * inverse * (1.0 + scale) + shift).to(Normed.dtype.element_ty), mask=ok)


@triton.jit
def backward_kernel(
    DStream, DNormed, Y, Stream, Gate, Scale, Phase, DX, DY, DPhase,
    dstream_strides, dnormed_strides, y_strides, phase_strides, gate_stride, scale_stride, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_ok = s < tokens
    ok = rows_ok[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    row, grads = (), ()
    total, grad_total = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        row = row + (tl.load(Stream + at, mask=ok, other=0.0).to(tl.float32),)  # noqa: RUF005
        at = b * dnormed_strides[0] + s[:, None] * dnormed_strides[1] + c * CHUNK + columns
        scale = load_vector(Scale + b * scale_stride, c, ROWS, CHUNK)
        grads = grads + (tl.load(DNormed + at, mask=ok, other=0.0).to(tl.float32) * (1.0 + scale),)  # noqa: RUF005
        total += row[c]
        grad_total += grads[c]
    mean, grad_mean = (tl.sum(total, 1) / WIDTH)[:, None], (tl.sum(grad_total, 1) / WIDTH)[:, None]
    square, cross = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        square += (row[c] - mean) * (row[c] - mean)
        cross += (row[c] - mean) * grads[c]
    inverse = tl.rsqrt(tl.sum(square, 1) / WIDTH + eps)[:, None]
    slope = (tl.sum(cross, 1) / WIDTH)[:, None] * inverse * inverse
    dangles = ()
    for c in tl.static_range(CHUNKS):
        at = b * dstream_strides[0] + s[:, None] * dstream_strides[1] + c * CHUNK + columns
        dx = tl.load(DStream + at, mask=ok, other=0.0).to(tl.float32)
        dx += inverse * (grads[c] - grad_mean - (row[c] - mean) * slope)
        at = (b * tokens + s[:, None]) * WIDTH + c * CHUNK + columns
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok)
        dy = load_vector(Gate + b * gate_stride, c, ROWS, CHUNK) * dx
        if Phase is not None:
            angle = load_angle(None, Phase, b, s, rows_ok, c, 1.0, phase_strides, HEAD, PAIRS, CHUNK, VECTOR)
            sine, cosine = sincos(angle)
            dy = rotate(dy, cosine, -sine, ROWS, CHUNK)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask=ok)
        if DPhase is not None:
            at = b * y_strides[0] + s[:, None] * y_strides[1] + c * CHUNK + columns
            y = tl.load(Y + at, mask=ok, other=0.0).to(tl.float32)
            dangles = dangles + (cross_pairs(y, dy, ROWS, CHUNK),)  # noqa: RUF005
    if DPhase is not None:
        store_angles(DPhase, dangles, b, s, rows_ok, tokens, 1.0, WIDTH // HEAD, HEAD, PAIRS, CHUNK, CHUNKS)


def unrotate_gate_norm(y, x, gate, scale, shift, phase, heads, eps):
    """See `reference.unrotate_gate_norm`."""
    batch, tokens, width = x.shape
    plan = plan_rows(width, ROWS, multiple_of=width // heads if phase is not None else 2)
    stream, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if x.numel() > 0:
        y, x, gate, scale, shift = (
            dense_rows(y),
            dense_rows(x),
            gate.contiguous(),
            scale.contiguous(),
            shift.contiguous(),
        )
        phase, phase_strides, pairs = phase_operand(phase)
        forward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            y, x, gate, scale, shift, phase, stream, normed, row_strides(y), row_strides(x), phase_strides,
            vector_stride(gate), vector_stride(scale), vector_stride(shift), tokens, eps,
            WIDTH=width, HEAD=width // heads, PAIRS=pairs, VECTOR=phase_vector(phase),
            ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, num_warps=plan.warps,
        )  # fmt: skip
    return stream, normed


def unrotate_gate_norm_backward(dstream, dnormed, y, stream, gate, scale, phase, heads, eps, need_phase):
    """See `reference.unrotate_gate_norm_backward`."""
    batch, tokens, width = stream.shape
    plan = plan_rows(width, ROWS, multiple_of=width // heads if phase is not None else 2)
    dx = torch.empty_like(stream, memory_format=torch.contiguous_format)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    dphase = None
    if need_phase and phase is not None:
        dphase = torch.empty((batch, tokens, heads, phase.shape[3]), dtype=torch.float32, device=y.device)
    if stream.numel() > 0:
        dstream, dnormed, y, stream = (dense_rows(t) for t in (dstream, dnormed, y, stream))
        gate, scale = gate.contiguous(), scale.contiguous()
        phase, phase_strides, pairs = phase_operand(phase)
        backward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            dstream, dnormed, y, stream.contiguous(), gate, scale, phase, dx, dy, dphase,
            row_strides(dstream), row_strides(dnormed), row_strides(y), phase_strides,
            vector_stride(gate), vector_stride(scale), tokens, eps,
            WIDTH=width, HEAD=width // heads, PAIRS=pairs, VECTOR=phase_vector(phase),
            ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, num_warps=plan.warps,
        )  # fmt: skip
    return dx, dy, stream.new_empty(0, dtype=torch.float32) if dphase is None else dphase
