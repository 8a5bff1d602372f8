"""Triton kernels of ``flow_step`` and ``flow_log_prob``.

The density of a new step is not reduced inside the step kernel: it is one more launch of the very kernel that the
replay launches, on the stored x'. Two compiled kernels may order or contract the same sum differently, one cannot, and
the ratio of an unchanged policy must be 1 to the last bit. The operands are still in the L2 cache. For the same reason
no multiply-add is contracted here.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.ops.flow_step.reference import gradient_buffers
from geoalign_kernels.philox import MASK32
from geoalign_kernels.triton_angles import log_unit, sincos_turns

BLOCK = 1024
WARPS = 4
# Columns of the device table: a, b, c, d, then what the reduction and its gradient need.
PRECISION, CONSTANT, SLOPE, COLUMNS = 4, 5, 6, 7


@triton.jit
def philox_block(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words."""
    for _ in tl.static_range(10):
        high0, high2 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _box_muller(radius_word, angle_word):
    u = ((radius_word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    t = ((angle_word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    radius = tl.sqrt_rn(-2.0 * log_unit(u))
    sine, cosine = sincos_turns(t)
    return radius * cosine, radius * sine


@triton.jit
def philox_normals(first, key0, key1, step, sample, group, BLOCK: tl.constexpr):
    """Normals of elements 4 * first .. 4 * first + BLOCK - 1."""
    block = (first + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    words = philox_block(
        block, zero + step.to(tl.uint32), zero + sample.to(tl.uint32), zero + group.to(tl.uint32),
        zero + key0.to(tl.uint32), zero + key1.to(tl.uint32),
    )  # fmt: skip
    z0, z1 = _box_muller(words[0], words[1])
    z2, z3 = _box_muller(words[2], words[3])
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit
def _mean(X, Velocity, Uncond, at, ok, a, b, guidance):
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    v = tl.load(Velocity + at, mask=ok, other=0.0).to(tl.float32)
    if Uncond is not None:
        u = tl.load(Uncond + at, mask=ok, other=0.0).to(tl.float32)
        v = u + guidance * (v - u)
    return a * x + b * v


@triton.jit(do_not_specialize=["key0", "key1", "step"])
def step_kernel(
    X, Velocity, Uncond, Previous, Noise, Group, Sample, Table, Out, table_stride, key0, key1, step, count, guidance,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok, at = i < count, sample * count + i
    row = Table + sample * table_stride
    out = _mean(X, Velocity, Uncond, at, ok, tl.load(row), tl.load(row + 1), guidance)
    if Previous is not None:
        out += tl.load(row + 3) * tl.load(Previous + at, mask=ok, other=0.0).to(tl.float32)
    if Noise is not None:
        out += tl.load(row + 2) * tl.load(Noise + at, mask=ok, other=0.0).to(tl.float32)
    if Group is not None:
        first = tl.program_id(0) * (BLOCK // 4)
        group, member = tl.load(Group + sample), tl.load(Sample + sample)
        out += tl.load(row + 2) * philox_normals(first, key0, key1, step, member, group, BLOCK)
    tl.store(Out + at, out, mask=ok)


@triton.jit
def log_prob_kernel(
    X, Velocity, Uncond, XNext, Table, Partial, table_stride, count, guidance, BLOCK: tl.constexpr
):  # fmt: skip
    """First stage: the sum of squared residuals of a block."""
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok, at = i < count, sample * count + i
    row = Table + sample * table_stride
    mean = _mean(X, Velocity, Uncond, at, ok, tl.load(row), tl.load(row + 1), guidance)
    residual = tl.where(ok, tl.load(XNext + at, mask=ok, other=0.0).to(tl.float32) - mean, 0.0)
    tl.store(Partial + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(residual * residual, 0))


@triton.jit
def log_prob_finish_kernel(
    Partial, Table, Out, table_stride, blocks, PRECISION: tl.constexpr, CONSTANT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Second stage: one program per sample adds the partial sums in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(Partial + sample * blocks + i, mask=i < blocks, other=0.0)
    row = Table + sample * table_stride
    tl.store(Out + sample, -tl.sum(total, 0) * tl.load(row + PRECISION) - tl.load(row + CONSTANT))


@triton.jit
def log_prob_backward_kernel(
    Grad, X, Velocity, Uncond, XNext, Table, DVelocity, DUncond, table_stride, count, guidance,
    SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok, at = i < count, sample * count + i
    row = Table + sample * table_stride
    mean = _mean(X, Velocity, Uncond, at, ok, tl.load(row), tl.load(row + 1), guidance)
    residual = tl.load(XNext + at, mask=ok, other=0.0).to(tl.float32) - mean
    guided = tl.load(Grad + sample) * tl.load(row + SLOPE) * residual
    if DVelocity is not None:
        grad = guided if Uncond is None else guidance * guided
        tl.store(DVelocity + at, grad.to(DVelocity.dtype.element_ty), mask=ok)
    if DUncond is not None:
        tl.store(DUncond + at, ((1.0 - guidance) * guided).to(DUncond.dtype.element_ty), mask=ok)


def _device_table(coefficients: Tensor, count: int, device: torch.device) -> tuple[Tensor, int]:
    """([B or 1, COLUMNS] float32 on the device, its row stride)."""
    rows = tuple(map(tuple, coefficients.reshape(-1, 4).tolist()))
    return _uploaded(rows, count, device), COLUMNS if len(rows) > 1 else 0


@functools.lru_cache(maxsize=1024)
def _uploaded(rows: tuple[tuple[float, ...], ...], count: int, device: torch.device) -> Tensor:
    """The table with its derived columns, computed in float64. A run has few rows and calls each many times: kept, they
    cost one copy each, and a call can be put in a CUDA graph, which no copy from pageable memory can."""
    table = torch.tensor(rows, dtype=torch.float64)
    b, c = table[:, 1], table[:, 2]
    safe = torch.where(c == 0, 1.0, c)
    derived = [0.5 / (safe.square() * count), safe.log() + 0.5 * math.log(2.0 * math.pi), b / (safe.square() * count)]
    return torch.cat([table, torch.stack(derived, dim=1)], dim=1).float().to(device)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise UnsupportedInput("the kernels compute in float32; float64 runs the reference")
    return [None if t is None else t.contiguous() for t in tensors]


def flow_step(x, velocity, coefficients, noise, key, group, sample, velocity_uncond, guidance, m_prev):
    """See ``reference.flow_step``."""
    x, velocity, velocity_uncond, m_prev, noise = _dense(x, velocity, velocity_uncond, m_prev, noise)
    count = x[0].numel() if x.shape[0] else 0
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    table, stride = _device_table(coefficients, count, x.device)
    seed, iteration, step, stream = key or (0, 0, 0, 0)
    group, sample = (None if t is None else t.contiguous() for t in (group, sample))
    step_kernel[(triton.cdiv(count, BLOCK), x.shape[0])](
        x, velocity, velocity_uncond, m_prev, noise, group, sample, table, out, stride,
        seed & MASK32, iteration, step + (stream << 16), count, guidance,
        BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def flow_log_prob(x, velocity, x_next, coefficients, velocity_uncond, guidance):
    """See ``reference.flow_log_prob``."""
    x, velocity, x_next, velocity_uncond = _dense(x, velocity, x_next, velocity_uncond)
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    count = x[0].numel()
    blocks = triton.cdiv(count, BLOCK)
    partial = torch.empty(x.shape[0], blocks, dtype=torch.float32, device=x.device)
    table, stride = _device_table(coefficients, count, x.device)
    log_prob_kernel[(blocks, x.shape[0])](
        x, velocity, velocity_uncond, x_next, table, partial, stride, count, guidance,
        BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    log_prob_finish_kernel[(x.shape[0],)](
        partial, table, out, stride, blocks, PRECISION, CONSTANT,
        BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def flow_log_prob_backward(grad, x, velocity, x_next, coefficients, velocity_uncond, guidance, needs):
    """See ``reference.flow_log_prob_backward``."""
    grad, x, velocity, x_next, velocity_uncond = _dense(grad, x, velocity, x_next, velocity_uncond)
    buffers = gradient_buffers(velocity, velocity_uncond, needs)
    if x.numel() == 0 or not any(needs):
        return buffers
    count = x[0].numel()
    table, stride = _device_table(coefficients, count, x.device)
    log_prob_backward_kernel[(triton.cdiv(count, BLOCK), x.shape[0])](
        grad, x, velocity, velocity_uncond, x_next, table,
        *(buffer if need else None for buffer, need in zip(buffers, needs, strict=True)), stride, count, guidance,
        SLOPE=SLOPE, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return buffers
