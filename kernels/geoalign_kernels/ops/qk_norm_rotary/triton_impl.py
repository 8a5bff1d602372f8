"""Triton kernels of `qk_norm_rotary`: one program per few tokens over the full width, every operand read once.

The camera phases are the one operand that cannot be read 16 bytes at a time: P = 42 values per head put every other
head off a 16-byte boundary. They are read in aligned pairs (`VECTOR`) and, in the backward, written one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.triton_common import (
    RowPlan,
    cross_pairs,
    load_angle,
    load_vector,
    phase_operand,
    phase_vector,
    plan_rows,
    rotate,
    row_strides,
    sincos,
    store_angles,
)

ROWS = 2
STEPS_BACKWARD = 16  # token tiles per backward program: one partial weight gradient each


@triton.jit
def _load_row(X, b, s, ok, strides, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The rows as a tuple of float32 chunks, and their sum of squares."""
    i = tl.arange(0, CHUNK)
    total = tl.zeros((s.shape[0], CHUNK), tl.float32)
    row = ()
    for c in tl.static_range(CHUNKS):
        at = b * strides[0] + s[:, None] * strides[1] + (c * CHUNK + i)[None, :]
        x = tl.load(X + at, mask=ok[:, None], other=0.0).to(tl.float32)
        total += x * x
        row = row + (x,)  # noqa: RUF005 - Triton knows tuple addition, not unpacking
    return row, tl.sum(total, 1)


@triton.jit
def _store(Y, y, b, s, ok, strides, c, CHUNK: tl.constexpr):
    at = b * strides[0] + s[:, None] * strides[1] + (c * CHUNK + tl.arange(0, CHUNK))[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok[:, None])


@triton.jit
def forward_kernel(
    Q, K, V, QOut, KOut, VOut, WeightQ, WeightK, Position, PhaseQK, PhaseVO,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides, qk_phase_strides, vo_phase_strides,
    tokens_q, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS_QK: tl.constexpr, PAIRS_VO: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok_q, ok = s < tokens_q, s < tokens
    q, square_q = _load_row(Q, b, s, ok_q, q_strides, CHUNK, CHUNKS)
    k, square_k = _load_row(K, b, s, ok, k_strides, CHUNK, CHUNKS)
    inverse_q = tl.rsqrt(square_q / WIDTH + eps)[:, None]
    inverse_k = tl.rsqrt(square_k / WIDTH + eps)[:, None]
    i = tl.arange(0, CHUNK)
    for c in tl.static_range(CHUNKS):
        q_unit = q[c] * inverse_q * load_vector(WeightQ, c, ROWS, CHUNK)
        k_unit = k[c] * inverse_k * load_vector(WeightK, c, ROWS, CHUNK)
        if Position is not None or PhaseQK is not None:
            angle = load_angle(Position, PhaseQK, b, s, ok, c, 1.0, qk_phase_strides, HEAD, PAIRS_QK, CHUNK, VECTOR)
            sine, cosine = sincos(angle)
            q_unit = rotate(q_unit, cosine, sine, ROWS, CHUNK)
            k_unit = rotate(k_unit, cosine, sine, ROWS, CHUNK)
        _store(QOut, q_unit, b, s, ok_q, q_out_strides, c, CHUNK)
        _store(KOut, k_unit, b, s, ok, k_out_strides, c, CHUNK)
    if V is not None:
        for c in tl.static_range(CHUNKS):
            at = b * v_strides[0] + s[:, None] * v_strides[1] + (c * CHUNK + i)[None, :]
            v = tl.load(V + at, mask=ok[:, None], other=0.0).to(tl.float32)
            angle = load_angle(None, PhaseVO, b, s, ok, c, -1.0, vo_phase_strides, HEAD, PAIRS_VO, CHUNK, VECTOR)
            sine, cosine = sincos(angle)
            _store(VOut, rotate(v, cosine, sine, ROWS, CHUNK), b, s, ok, v_out_strides, c, CHUNK)


@triton.jit
def _norm_backward(
    DY, X, DX, Weight, weight_sum, angles, dangles, b, s, ok, dy_strides, x_strides, dx_strides, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    """dx of one normalised and rotated operand; returns the grown weight gradient and angle gradients."""
    i = tl.arange(0, CHUNK)
    x, square = _load_row(X, b, s, ok, x_strides, CHUNK, CHUNKS)
    inverse = tl.rsqrt(square / WIDTH + eps)[:, None]
    dot = tl.zeros((ROWS, CHUNK), tl.float32)
    grads, weight_sums, angle_sums = (), (), ()
    for c in tl.static_range(CHUNKS):
        at = b * dy_strides[0] + s[:, None] * dy_strides[1] + (c * CHUNK + i)[None, :]
        dz = tl.load(DY + at, mask=ok[:, None], other=0.0).to(tl.float32)
        weight = load_vector(Weight, c, ROWS, CHUNK)
        unit = x[c] * inverse
        if len(angles) > 0:
            sine, cosine = sincos(angles[c])
            dz = rotate(dz, cosine, -sine, ROWS, CHUNK)
        if ANGLES:
            angle_sums = angle_sums + (dangles[c] + cross_pairs(unit * weight, dz, ROWS, CHUNK),)  # noqa: RUF005
        weight_sums = weight_sums + (weight_sum[c] + dz * unit,)  # noqa: RUF005
        grads = grads + (dz * weight,)  # noqa: RUF005
        dot += dz * weight * unit
    mean = (tl.sum(dot, 1) / WIDTH)[:, None]
    for c in tl.static_range(CHUNKS):
        _store(DX, inverse * (grads[c] - x[c] * inverse * mean), b, s, ok, dx_strides, c, CHUNK)
    return weight_sums, angle_sums


@triton.jit
def backward_kernel(
    DQOut, DKOut, Q, K, DQ, DK, WeightQ, WeightK, Position, PhaseQK, DWeight, DPhaseQK,
    dq_strides, dk_strides, q_strides, k_strides, q_in_strides, k_in_strides, qk_phase_strides,
    tokens_q, tokens, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS_QK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, CHUNK)
    sum_q, sum_k = (), ()
    for _ in tl.static_range(CHUNKS):
        sum_q = sum_q + (tl.zeros((ROWS, CHUNK), tl.float32),)  # noqa: RUF005
        sum_k = sum_k + (tl.zeros((ROWS, CHUNK), tl.float32),)  # noqa: RUF005
    for step in range(STEPS):
        s = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        ok_q, ok = s < tokens_q, s < tokens
        angles, dangles = (), ()
        for c in tl.static_range(CHUNKS):
            if Position is not None or PhaseQK is not None:
                angle = load_angle(Position, PhaseQK, b, s, ok, c, 1.0, qk_phase_strides, HEAD, PAIRS_QK, CHUNK, VECTOR)
                angles = angles + (angle,)  # noqa: RUF005
            if DPhaseQK is not None:
                dangles = dangles + (tl.zeros((ROWS, CHUNK // 2), tl.float32),)  # noqa: RUF005
        sum_q, dangles = _norm_backward(
            DQOut, Q, DQ, WeightQ, sum_q, angles, dangles, b, s, ok_q, dq_strides, q_strides, q_in_strides, eps,
            WIDTH, ROWS, CHUNK, CHUNKS, DPhaseQK is not None,
        )  # fmt: skip
        sum_k, dangles = _norm_backward(
            DKOut, K, DK, WeightK, sum_k, angles, dangles, b, s, ok, dk_strides, k_strides, k_in_strides, eps,
            WIDTH, ROWS, CHUNK, CHUNKS, DPhaseQK is not None,
        )  # fmt: skip
        if DPhaseQK is not None:
            store_angles(DPhaseQK, dangles, b, s, ok, tokens, 1.0, WIDTH // HEAD, HEAD, PAIRS_QK, CHUNK, CHUNKS)
    if DWeight is not None:
        row = DWeight + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * WIDTH + i
        for c in tl.static_range(CHUNKS):
            tl.store(row + c * CHUNK, tl.sum(sum_q[c], 0))
            tl.store(row + WIDTH + c * CHUNK, tl.sum(sum_k[c], 0))


@triton.jit
def value_backward_kernel(
    DVOut, V, DV, PhaseVO, DPhaseVO, dv_strides, v_strides, v_in_strides, vo_phase_strides, tokens,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS_VO: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Apart from q and k, which share angles and hold weight sums: together they need more than 255 registers."""
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = s < tokens
    columns = tl.arange(0, CHUNK)[None, :]
    dangles = ()
    for c in tl.static_range(CHUNKS):
        sine, cosine = sincos(
            load_angle(None, PhaseVO, b, s, ok, c, -1.0, vo_phase_strides, HEAD, PAIRS_VO, CHUNK, VECTOR)
        )
        at = b * dv_strides[0] + s[:, None] * dv_strides[1] + c * CHUNK + columns
        dv = rotate(tl.load(DVOut + at, mask=ok[:, None], other=0.0).to(tl.float32), cosine, -sine, ROWS, CHUNK)
        _store(DV, dv, b, s, ok, v_in_strides, c, CHUNK)
        if DPhaseVO is not None:
            at = b * v_strides[0] + s[:, None] * v_strides[1] + c * CHUNK + columns
            v = tl.load(V + at, mask=ok[:, None], other=0.0).to(tl.float32)
            dangles = dangles + (cross_pairs(v, dv, ROWS, CHUNK),)  # noqa: RUF005
    if DPhaseVO is not None:
        store_angles(DPhaseVO, dangles, b, s, ok, tokens, -1.0, WIDTH // HEAD, HEAD, PAIRS_VO, CHUNK, CHUNKS)


def qk_norm_rotary(q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps):
    """Out of place; see `reference.qk_norm_rotary`."""
    outputs = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    _forward(q, k, v, outputs, weight_q, weight_k, position, phase_qk, phase_vo, eps)
    return outputs[0], outputs[1], q.new_empty(0) if v is None else outputs[2]


def qk_norm_rotary_(q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps):
    """In place: every program reads its rows whole before it writes them."""
    for tensor in (q, k, v):
        if tensor is not None and not _dense_rows(tensor):
            raise UnsupportedInput("in place, q, k and v need dense heads and channels")
    _forward(q, k, v, (q, k, v), weight_q, weight_k, position, phase_qk, phase_vo, eps)


def _dense_rows(x: Tensor) -> bool:
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def _rows(x: Tensor | None) -> Tensor | None:
    """x itself, or a copy, such that heads and channels are dense."""
    return x if x is None or _dense_rows(x) else x.contiguous()


def _plan(k: Tensor, rows: int) -> RowPlan:
    return plan_rows(k.shape[2] * k.shape[3], rows, multiple_of=k.shape[3])


def _forward(q, k, v, outputs, weight_q, weight_k, position, phase_qk, phase_vo, eps):
    batch, tokens, heads, head = k.shape
    plan = _plan(k, ROWS)
    if k.numel() == 0:
        return
    q, k, v = _rows(q), _rows(k), _rows(v)
    q_out, k_out, v_out = outputs
    position = None if position is None else position.contiguous()
    phase_qk, qk_strides, pairs_qk = phase_operand(phase_qk)
    phase_vo, vo_strides, pairs_vo = phase_operand(phase_vo)
    vector = phase_vector(phase_qk, phase_vo)
    forward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
        q, k, v, q_out, k_out, v_out, weight_q, weight_k, position, phase_qk, phase_vo,
        row_strides(q), row_strides(k), row_strides(v), row_strides(q_out), row_strides(k_out), row_strides(v_out),
        qk_strides, vo_strides,
        q.shape[1], tokens, eps,
        WIDTH=heads * head, HEAD=head, PAIRS_QK=pairs_qk, PAIRS_VO=pairs_vo,
        ROWS=plan.rows, CHUNK=plan.chunk, CHUNKS=plan.chunks, VECTOR=vector, num_warps=plan.warps,
    )  # fmt: skip


def qk_norm_rotary_backward(
    dq, dk, dv, q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps, need_weight, need_phase
):
    """See `reference.qk_norm_rotary_backward`; partial weight gradients are summed in a fixed order."""
    batch, tokens, heads, head = k.shape
    plan = _plan(k, ROWS)
    shape = {"WIDTH": heads * head, "HEAD": head, "ROWS": plan.rows, "CHUNK": plan.chunk, "CHUNKS": plan.chunks}
    grid = (triton.cdiv(tokens, plan.rows * STEPS_BACKWARD), batch)
    empty = q.new_empty(0, dtype=torch.float32)
    partial = empty.new_zeros(grid[0] * batch, 2, heads * head) if need_weight else None
    dweights = (empty, empty)
    dphase_qk, dphase_vo = (
        empty.new_empty(batch, tokens, heads, p.shape[3]) if need_phase and p is not None else None
        for p in (phase_qk, phase_vo)
    )
    dq_in, dk_in, dv_in = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)
    )
    if k.numel() > 0:
        q, k, dq, dk = (_rows(t) for t in (q, k, dq, dk))
        phase, strides, pairs = phase_operand(phase_qk)
        backward_kernel[grid](
            dq, dk, q, k, dq_in, dk_in, weight_q, weight_k,
            None if position is None else position.contiguous(), phase, partial, dphase_qk,
            *(row_strides(t) for t in (dq, dk, q, k, dq_in, dk_in)), strides, q.shape[1], tokens, eps,
            PAIRS_QK=pairs, VECTOR=phase_vector(phase), STEPS=STEPS_BACKWARD, num_warps=plan.warps, **shape,
        )  # fmt: skip
    if v is not None and v.numel() > 0:
        v, dv = _rows(v), _rows(dv)
        phase, strides, pairs = phase_operand(phase_vo)
        value_backward_kernel[(triton.cdiv(tokens, plan.rows), batch)](
            dv, v, dv_in, phase, dphase_vo, *(row_strides(t) for t in (dv, v, dv_in)), strides, tokens,
            PAIRS_VO=pairs, VECTOR=phase_vector(phase), num_warps=plan.warps, **shape,
        )  # fmt: skip
    if partial is not None:
        dweights = partial.sum(0).unbind(0)
    dv_in = q.new_empty(0) if dv_in is None else dv_in
    return dq_in, dk_in, dv_in, *dweights, *(empty if p is None else p for p in (dphase_qk, dphase_vo))
