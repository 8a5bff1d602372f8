"""Triton kernels of ``qk_norm_rotary``: one program per few tokens over the full width, every operand read once.

The camera phases are the one operand that cannot be read 16 bytes at a time: P = 42 values per head put every other
head off a 16-byte boundary. They are read and written in aligned pairs.

Shapes in the bodies: R rows and C columns of a chunk; a row is a tuple of chunks ``[R, C]``, its angles one of
``[R, C/2]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.ops.qk_norm_rotary.reference import gradient_buffers
from geoalign_kernels.triton_angles import (
    cross_pairs,
    load_angle,
    load_turn,
    phase_operand,
    phase_vector,
    rotate,
    sincos,
    store_angles,
)
from geoalign_kernels.triton_rows import (
    RowPlan,
    load_chunk,
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

STEPS_BACKWARD = 16  # token tiles per backward program: one partial weight gradient each


@triton.jit
def forward_kernel(
    Q, K, V, QOut, KOut, VOut, WeightQ, WeightK, Position, PhaseQK, PhaseVO,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides, qk_phase_strides, vo_phase_strides,
    tokens_q, tokens, eps,
    HEAD: tl.constexpr, PAIRS_QK: tl.constexpr, PAIRS_VO: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    ok_q = s < tokens_q
    q = load_rows(Q, b, s, ok_q, q_strides, CHUNK, CHUNKS)
    k = load_rows(K, b, s, ok, k_strides, CHUNK, CHUNKS)
    inverse_q = tl.rsqrt(row_covariance(q, 0.0, q, 0.0, WIDTH) + eps)  # [R, 1]
    inverse_k = tl.rsqrt(row_covariance(k, 0.0, k, 0.0, WIDTH) + eps)
    for c in tl.static_range(CHUNKS):
        q_unit = q[c] * inverse_q * load_vector(WeightQ, c, ROWS, CHUNK)  # [R, C]
        k_unit = k[c] * inverse_k * load_vector(WeightK, c, ROWS, CHUNK)
        if Position is not None or PhaseQK is not None:
            angle = load_angle(Position, PhaseQK, b, s, ok, c, 1.0, qk_phase_strides, HEAD, PAIRS_QK, CHUNK, VECTOR)
            sine, cosine = sincos(angle)  # [R, C/2] each
            q_unit = rotate(q_unit, cosine, sine, ROWS, CHUNK)
            k_unit = rotate(k_unit, cosine, sine, ROWS, CHUNK)
        store_chunk(QOut, q_unit, b, s, ok_q, q_out_strides, c, CHUNK)
        store_chunk(KOut, k_unit, b, s, ok, k_out_strides, c, CHUNK)
    if V is not None:
        for c in tl.static_range(CHUNKS):
            sine, cosine = load_turn(PhaseVO, b, s, ok, c, -1.0, vo_phase_strides, HEAD, PAIRS_VO, CHUNK, VECTOR)
            v = rotate(load_chunk(V, b, s, ok, v_strides, c, CHUNK), cosine, sine, ROWS, CHUNK)
            store_chunk(VOut, v, b, s, ok, v_out_strides, c, CHUNK)


@triton.jit
def backward_kernel(
    DQOut, DKOut, Q, K, DQ, DK, WeightQ, WeightK, Position, PhaseQK, DWeightQ, DWeightK, DPhaseQK,
    dq_strides, dk_strides, q_strides, k_strides, q_in_strides, k_in_strides, qk_phase_strides,
    tokens_q, tokens, eps,
    HEAD: tl.constexpr, PAIRS_QK: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, their weights (one partial sum per program) and the phases, each where it has a place."""
    b = tl.program_id(1).to(tl.int64)
    WITH_Q: tl.constexpr = DQ is not None or DWeightQ is not None or DPhaseQK is not None
    WITH_K: tl.constexpr = DK is not None or DWeightK is not None or DPhaseQK is not None
    sum_q = zero_tiles(DWeightQ is not None, ROWS, CHUNK, CHUNKS)  # chunks [R, C]
    sum_k = zero_tiles(DWeightK is not None, ROWS, CHUNK, CHUNKS)
    for step in range(STEPS):
        s = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)  # [R]
        ok_q, ok = s < tokens_q, s < tokens
        angles, dangles = (), zero_tiles(DPhaseQK is not None, ROWS, CHUNK // 2, CHUNKS)
        if Position is not None or PhaseQK is not None:
            for c in tl.static_range(CHUNKS):
                angle = load_angle(Position, PhaseQK, b, s, ok, c, 1.0, qk_phase_strides, HEAD, PAIRS_QK, CHUNK, VECTOR)
                angles = angles + (angle,)  # noqa: RUF005
        if WITH_Q:
            sum_q, dangles = norm_backward(
                DQOut, Q, DQ, WeightQ, sum_q, angles, dangles, b, s, ok_q, dq_strides, q_strides, q_in_strides, eps,
                DWeightQ is not None, DPhaseQK is not None, WIDTH, ROWS, CHUNK, CHUNKS,
            )  # fmt: skip
        if WITH_K:
            sum_k, dangles = norm_backward(
                DKOut, K, DK, WeightK, sum_k, angles, dangles, b, s, ok, dk_strides, k_strides, k_in_strides, eps,
                DWeightK is not None, DPhaseQK is not None, WIDTH, ROWS, CHUNK, CHUNKS,
            )  # fmt: skip
        if DPhaseQK is not None:
            store_angles(DPhaseQK, dangles, b, s, ok, tokens, 1.0, WIDTH // HEAD, HEAD, PAIRS_QK, CHUNK, CHUNKS)
    if DWeightQ is not None:
        store_vector_sum(DWeightQ, sum_q, b, WIDTH, CHUNK, CHUNKS)
    if DWeightK is not None:
        store_vector_sum(DWeightK, sum_k, b, WIDTH, CHUNK, CHUNKS)


@triton.jit
def value_backward_kernel(
    DVOut, V, DV, PhaseVO, DPhaseVO, dv_strides, v_strides, v_in_strides, vo_phase_strides, tokens,
    HEAD: tl.constexpr, PAIRS_VO: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Apart from q and k, which share angles and hold weight sums: together they need more than 255 registers."""
    b, s, ok = row_tile(tokens, ROWS)  # (), [R], [R]
    dangles = ()
    for c in tl.static_range(CHUNKS):
        sine, cosine = load_turn(PhaseVO, b, s, ok, c, -1.0, vo_phase_strides, HEAD, PAIRS_VO, CHUNK, VECTOR)
        dv = rotate(load_chunk(DVOut, b, s, ok, dv_strides, c, CHUNK), cosine, -sine, ROWS, CHUNK)
        if DV is not None:
            store_chunk(DV, dv, b, s, ok, v_in_strides, c, CHUNK)
        if DPhaseVO is not None:
            v = load_chunk(V, b, s, ok, v_strides, c, CHUNK)
            dangles = dangles + (cross_pairs(v, dv, ROWS, CHUNK),)  # noqa: RUF005
    if DPhaseVO is not None:
        store_angles(DPhaseVO, dangles, b, s, ok, tokens, -1.0, WIDTH // HEAD, HEAD, PAIRS_VO, CHUNK, CHUNKS)


def qk_norm_rotary(q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps):
    """Out of place; see ``reference.qk_norm_rotary``."""
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


def _plan(k: Tensor) -> RowPlan:
    return plan_rows(k.shape[2] * k.shape[3], multiple_of=k.shape[3])


def _forward(q, k, v, outputs, weight_q, weight_k, position, phase_qk, phase_vo, eps):
    batch, tokens, _, head = k.shape
    plan = _plan(k)
    if k.numel() == 0:
        return
    q, k, v = _rows(q), _rows(k), _rows(v)
    q_out, k_out, v_out = outputs
    position = None if position is None else position.contiguous()
    phase_qk, qk_strides, pairs_qk = phase_operand(phase_qk)
    phase_vo, vo_strides, pairs_vo = phase_operand(phase_vo)
    forward_kernel[plan.grid(tokens, batch)](
        q, k, v, q_out, k_out, v_out, weight_q.contiguous(), weight_k.contiguous(), position, phase_qk, phase_vo,
        row_strides(q), row_strides(k), row_strides(v), row_strides(q_out), row_strides(k_out), row_strides(v_out),
        qk_strides, vo_strides, q.shape[1], tokens, eps,
        HEAD=head, PAIRS_QK=pairs_qk, PAIRS_VO=pairs_vo, VECTOR=phase_vector(phase_qk, phase_vo), **plan.constants,
    )  # fmt: skip


def qk_norm_rotary_backward(
    dq, dk, dv, q, k, v, weight_q, weight_k, position, phase_qk, phase_vo, eps, needs
):  # fmt: skip
    """See ``reference.qk_norm_rotary_backward``; partial weight gradients are summed in a fixed order."""
    batch, tokens, heads, head = k.shape
    plan = _plan(k)
    buffers = gradient_buffers(dq, dk, dv, weight_q, weight_k, phase_qk, phase_vo, needs)
    places = [buffer if need else None for buffer, need in zip(buffers, needs, strict=True)]
    dq_in, dk_in, dv_in, dweight_q, dweight_k, dphase_qk, dphase_vo = places
    if any(place is not None for place in (dq_in, dk_in, dweight_q, dweight_k, dphase_qk)) and k.numel() > 0:
        grid = plan.grid(triton.cdiv(tokens, STEPS_BACKWARD), batch)
        partials = [None if w is None else w.new_empty(grid[0] * batch, heads * head) for w in (dweight_q, dweight_k)]
        q, k, dq, dk = (_rows(t) for t in (q, k, dq, dk))
        phase, strides, pairs = phase_operand(phase_qk)
        backward_kernel[grid](
            dq, dk, q, k, dq_in, dk_in, weight_q.contiguous(), weight_k.contiguous(),
            None if position is None else position.contiguous(), phase, *partials, dphase_qk,
            *(row_strides(t) for t in (dq, dk, q, k, dq_in, dk_in)), strides, q.shape[1], tokens, eps,
            HEAD=head, PAIRS_QK=pairs, VECTOR=phase_vector(phase), STEPS=STEPS_BACKWARD, **plan.constants,
        )  # fmt: skip
        for total, partial in zip((dweight_q, dweight_k), partials, strict=True):
            if partial is not None:
                torch.sum(partial, 0, out=total)
    if (dv_in is not None or dphase_vo is not None) and dv.numel() > 0:
        v, dv = _rows(v), _rows(dv)
        phase, strides, pairs = phase_operand(phase_vo)
        value_backward_kernel[plan.grid(tokens, batch)](
            dv, v, dv_in, phase, dphase_vo, *(row_strides(t) for t in (dv, v, dv_in)), strides, tokens,
            HEAD=head, PAIRS_VO=pairs, VECTOR=phase_vector(phase), **plan.constants,
        )  # fmt: skip
    return tuple(buffers)
