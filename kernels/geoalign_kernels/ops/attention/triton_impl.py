"""Triton attention forward, exact and with int8 scores: one streaming-softmax kernel, and the int8 quantiser.

Tiles are fixed per architecture and never tuned at run time: ranks that tune apart would round apart. Every key block
is masked (65,520 = 1023.75 x 64): a second, unmasked copy of the loop body makes sm_80 spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import UnsupportedInput, interpreting

LOG2E = 1.4426950408889634
QUERY_BLOCK, KEY_BLOCK = 128, 64  # also the blocks of the int8 scales
WARPS, STAGES = 8, 3


@triton.jit
def _accumulate(
    acc, highest, total, q, K, V, KScale, start, tokens_k, k_stride, v_stride, factor,
    HEAD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One key block of the streaming softmax in base 2."""
    local, d = tl.arange(0, BN), tl.arange(0, HEAD)
    n = start + local
    # 64-bit offsets only in the scalar base: in the tile they would cost the registers that sm_80 lacks.
    K += tl.cast(start, tl.int64) * k_stride
    V += tl.cast(start, tl.int64) * v_stride
    ok = n < tokens_k
    k = tl.load(K + local[None, :] * k_stride + d[:, None], mask=ok[None, :], other=0)
    v = tl.load(V + local[:, None] * v_stride + d[None, :], mask=ok[:, None], other=0)
    if KScale is not None:
        scores = tl.dot(q, k).to(tl.float32) * (factor * tl.load(KScale + start // BN))
    else:
        scores = tl.dot(q, k, input_precision="ieee") * factor
    scores = tl.where(ok[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    p = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_highest, total


@triton.jit
def attention_kernel(
    Q, K, V, Out, Lse, QScale, KScale, q_strides, k_strides, v_strides, tokens_q, tokens_k, scale_log2, heads,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, HEAD)
    ok = (m < tokens_q)[:, None]
    q = tl.load(Q + b * q_strides[0] + h * HEAD + m.to(tl.int64)[:, None] * q_strides[1] + d[None, :], mask=ok, other=0)
    K += b * k_strides[0] + h * HEAD
    V += b * v_strides[0] + h * HEAD
    factor = scale_log2
    if QScale is not None:
        factor *= tl.load(QScale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        KScale += tl.program_id(1) * tl.cdiv(tokens_k, BN)
    acc, total = tl.zeros((BM, HEAD), tl.float32), tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    for start in range(0, tokens_k, BN):
        acc, highest, total = _accumulate(
            acc, highest, total, q, K, V, KScale, start, tokens_k, k_strides[1], v_strides[1], factor, HEAD, BN
        )
    at = ((b * tokens_q + m.to(tl.int64)[:, None]) * heads + h) * HEAD + d[None, :]
    tl.store(Out + at, (acc / total[:, None]).to(Out.dtype.element_ty), mask=ok)
    if Lse is not None:
        lse = (highest + tl.log2(total)) * 0.6931471805599453
        tl.store(Lse + tl.program_id(1).to(tl.int64) * tokens_q + m, lse, mask=m < tokens_q)


@triton.jit
def quantise_kernel(
    X, Mean, Out, Scale, strides, tokens, heads, HEAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Symmetric int8 of one block of tokens and one head, rounded half away from zero."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    s, d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD)
    ok = (s < tokens)[:, None]
    x = tl.load(X + b * strides[0] + h * HEAD + s[:, None] * strides[1] + d[None, :], mask=ok, other=0).to(tl.float32)
    if Mean is not None:
        x = tl.where(ok, x - tl.load(Mean + (b * heads + h) * HEAD + d)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-8) / 127.0
    scaled = x / scale
    rounded = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int8)
    tl.store(Out + ((b * tokens + s[:, None]) * heads + h) * HEAD + d[None, :], rounded, mask=ok)
    tl.store(Scale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), scale)


def _check(q: Tensor) -> None:
    head = q.shape[3]
    if head < 16 or head & (head - 1) or head > 128 or q.dtype == torch.float64:
        raise UnsupportedInput(f"the attention kernel takes heads of 16, 32, 64 or 128 below float64, got {head}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def exact_key_block(device: torch.device) -> int:
    """Keys a step of the exact kernel: 64 keys do not fit the registers of sm_80 without spills, 32 do."""
    return KEY_BLOCK if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0) else KEY_BLOCK // 2


def _launch(q, k, v, lse, q_scale, k_scale, scale, dtype):
    batch, tokens, heads, head = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    stages = 1 if interpreting() else STAGES
    key_block = KEY_BLOCK if k_scale is not None else exact_key_block(q.device)
    attention_kernel[(triton.cdiv(tokens, QUERY_BLOCK), batch * heads)](
        q, k, v, out, lse, q_scale, k_scale, _strides(q), _strides(k), _strides(v), tokens, k.shape[1],
        scale * LOG2E, heads, HEAD=head, BM=QUERY_BLOCK, BN=key_block,
        num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(O, LSE); see `reference.forward`."""
    _check(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    return _launch(q, k, v, lse, None, None, scale, q.dtype), lse


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See `reference.attention_int8`."""
    _check(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q)
    mean = k.mean(1, dtype=torch.float32)
    q8, q_scale = _quantise(q, None, QUERY_BLOCK)
    k8, k_scale = _quantise(k, mean, KEY_BLOCK)
    return _launch(q8, k8, v, None, q_scale, k_scale, scale, q.dtype)


def _quantise(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head = x.shape
    blocks = triton.cdiv(tokens, block)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    quantise_kernel[(blocks, batch * heads)](
        x, mean, out, scale, _strides(x), tokens, heads, HEAD=head, BLOCK=block, num_warps=4
    )
    return out, scale
