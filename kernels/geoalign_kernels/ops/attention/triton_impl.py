"""Triton attention forward, exact and quantised: one streaming-softmax kernel, and the quantisers of its operands.

Tiles are fixed per architecture and never tuned at run time: ranks that tune apart would round apart. They are the
largest that compile without spills: every multiprocessor is busy with one tile anyway, and the wider it is, the fewer
instructions a key costs beside the tensor cores.

Shapes in the bodies: M queries of a tile, N keys of a block, D channels of a head, S tokens quantised together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import BackendUnavailableError, UnsupportedInput, interpreting
from geoalign_kernels.ops.attention import cores
from geoalign_kernels.ops.attention.reference import FP8_MAX, SCALE_BLOCK

LOG2E = 1.4426950408889634
HEADS = (16, 32, 64, 128)
QUANTISED_HEADS = (32, 64, 128)
"""An 8-bit product sums over at least 32."""
QUERY_BLOCK, WARPS, STAGES = 128, 8, 3
KEY_BLOCK = {80: 64, 90: 128}
VALUE_BLOCK, QUANTISE_WARPS = 64, 8
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_LOG2_FP8_MAX = tl.constexpr(math.log2(FP8_MAX))


@triton.jit
def _accumulate(
    acc, highest, total, q, K, V, KScale, start, tokens_k, k_stride, v_stride, factor,
    HEAD: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One key block of the streaming softmax in base 2; ``highest`` is in units of factor * score."""
    local, d = tl.arange(0, BN), tl.arange(0, HEAD)
    ok = start + local < tokens_k
    # 64-bit offsets only in the scalar base: in the tile they would cost the registers that sm_80 lacks.
    K += tl.cast(start, tl.int64) * k_stride
    k = tl.load(K + local[None, :] * k_stride + d[:, None], mask=ok[None, :], other=0)  # [D, N]
    if KScale is not None:
        factor *= tl.load(KScale + start // _SCALE_BLOCK)
        scores = tl.dot(q, k).to(tl.float32)  # [M, N]
    else:
        scores = tl.dot(q, k, input_precision="ieee")
    if start + BN > tokens_k:  # in a branch: as a mask on every block it would cost registers and time
        scores = tl.where(ok[None, :], scores, float("-inf"))
    # The factor is positive, so it may follow the maximum, and scaling the scores is one multiply-add of the exponent.
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)  # [M]
    # fp8 probabilities reach up to the largest fp8 number; so does their sum, which divides it out again.
    shift = new_highest - _LOG2_FP8_MAX if FP8 else new_highest
    p = tl.exp2(scores * factor - shift[:, None])  # [M, N]
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(p, 1)
    if FP8:
        # fp8 products exist for operands whose summed dimension is contiguous: v is [channels, keys] here, padded.
        v = tl.load(V + start + local[:, None] + d[None, :] * v_stride)  # [N, D]
        # The tensor cores keep fewer bits than float32 while they sum fp8 products (SageAttention2, arXiv 2411.10958):
        # each block is summed by itself and added in float32.
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    else:
        V += tl.cast(start, tl.int64) * v_stride
        v = tl.load(V + local[:, None] * v_stride + d[None, :], mask=ok[:, None], other=0)  # [N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_highest, total


@triton.jit
def attention_kernel(
    Q, K, V, Out, Lse, QScale, KScale, VScale, VMean, q_strides, k_strides, v_strides, tokens_q, tokens_k, scale_log2,
    heads, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """v is [B, S, H, HEAD], or with VScale an fp8 [B * H, HEAD, padded S] of strides (head, channel)."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, HEAD)  # [M], [D]
    ok = (m < tokens_q)[:, None]
    q = tl.load(Q + b * q_strides[0] + h * HEAD + m.to(tl.int64)[:, None] * q_strides[1] + d[None, :], mask=ok, other=0)
    K += b * k_strides[0] + h * HEAD
    if VScale is not None:
        V += tl.program_id(1).to(tl.int64) * v_strides[0]
    else:
        V += b * v_strides[0] + h * HEAD
    factor = scale_log2
    if QScale is not None:
        factor *= tl.load(QScale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        KScale += tl.program_id(1) * tl.cdiv(tokens_k, _SCALE_BLOCK)
    acc, total = tl.zeros((BM, HEAD), tl.float32), tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    for start in range(0, tokens_k, BN):
        acc, highest, total = _accumulate(
            acc, highest, total, q, K, V, KScale, start, tokens_k, k_strides[1], v_strides[1], factor, HEAD, BN,
            VScale is not None,
        )  # fmt: skip
    out = acc / total[:, None]  # [M, D]
    if VScale is not None:
        channel = tl.program_id(1) * HEAD + d
        out = out * tl.load(VScale + channel)[None, :] + tl.load(VMean + channel)[None, :]
    at = ((b * tokens_q + m.to(tl.int64)[:, None]) * heads + h) * HEAD + d[None, :]
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=ok)
    if Lse is not None:
        lse = (highest + tl.log2(total)) * 0.6931471805599453
        tl.store(Lse + tl.program_id(1).to(tl.int64) * tokens_q + m, lse, mask=m < tokens_q)


@triton.jit
def quantise_kernel(
    X, Mean, Out, Scale, strides, tokens, heads, HEAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Symmetric int8 of one block of tokens and one head, rounded half away from zero."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    s, d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD)  # [S], [D]
    ok = (s < tokens)[:, None]
    x = tl.load(X + b * strides[0] + h * HEAD + s[:, None] * strides[1] + d[None, :], mask=ok, other=0).to(tl.float32)
    if Mean is not None:
        x = tl.where(ok, x - tl.load(Mean + (b * heads + h) * HEAD + d)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-8) / 127.0
    scaled = x / scale  # [S, D]
    rounded = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int8)
    tl.store(Out + ((b * tokens + s[:, None]) * heads + h) * HEAD + d[None, :], rounded, mask=ok)
    tl.store(Scale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), scale)


@triton.jit
def quantise_values_kernel(
    X, Mean, Scale, Out, strides, tokens, padded, heads, HEAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(x - mean) / scale in fp8 with the tokens of a channel side by side, zeros behind the last token."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    s, d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD)  # [S], [D]
    ok = (s < tokens)[:, None]
    x = tl.load(X + b * strides[0] + h * HEAD + s[:, None] * strides[1] + d[None, :], mask=ok, other=0).to(tl.float32)
    channel = (b * heads + h) * HEAD + d  # [D]
    scaled = (x - tl.load(Mean + channel)[None, :]) / tl.load(Scale + channel)[None, :]
    scaled = tl.where(ok, scaled, 0.0).to(Out.dtype.element_ty)
    tl.store(Out + channel[None, :] * padded + s[:, None], scaled)


def _check(q: Tensor, scale: float, heads: tuple[int, ...]) -> None:
    head = q.shape[3]
    if head not in heads or q.dtype == torch.float64:
        raise UnsupportedInput(f"the attention kernel takes heads of {heads} below float64, got {head} in {q.dtype}")
    if scale <= 0.0:
        raise UnsupportedInput(f"the attention kernel takes positive scales, got {scale}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def key_block(device: torch.device) -> int:
    """Keys a step: 128 on compute capability 9.x, 64 elsewhere and in the interpreter."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return KEY_BLOCK[90 if hopper else 80]


def _launch(q, k, v, lse, q_scale, k_scale, v_scale, v_mean, scale, dtype):
    batch, tokens, heads, head = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    stages = 1 if interpreting() else STAGES
    attention_kernel[(triton.cdiv(tokens, QUERY_BLOCK), batch * heads)](
        q, k, v, out, lse, q_scale, k_scale, v_scale, v_mean, _strides(q), _strides(k), _strides(v), tokens,
        k.shape[1], scale * LOG2E, heads,
        HEAD=head, BM=QUERY_BLOCK, BN=key_block(q.device), num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(O, LSE); see ``reference.forward``."""
    _check(q, scale, HEADS)
    q, k, v = _rows(q), _rows(k), _rows(v)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    return _launch(q, k, v, lse, None, None, None, None, scale, q.dtype), lse


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See ``reference.attention_int8``.

    Float32 values are rounded to bfloat16, an eighth of the error of the scores: in float32 they would take three times
    the shared memory of a block and the plain cores in place of the tensor cores.
    """
    _check(q, scale, QUANTISED_HEADS)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if v.dtype == torch.float32 and not interpreting():  # whose products know no bfloat16
        v = v.bfloat16()
    return _launch(*_quantised_scores(q, k, _rows(v), None), None, None, scale, q.dtype)


def attention_int8_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See ``reference.attention_int8_fp8``.

    Raises:
        BackendUnavailableError: the device is not of compute capability 9.0.
    """
    _check(q, scale, QUANTISED_HEADS)
    reason = cores.why_not_fp8(q.device)
    if reason:
        raise BackendUnavailableError(f"attention mode 'int8_fp8': {reason}; use mode='int8'")
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    v8, v_scale, v_mean = _quantise_values(_rows(v))
    return _launch(*_quantised_scores(q, k, v8, None), v_scale, v_mean, scale, q.dtype)


def _quantised_scores(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The first arguments of ``_launch`` for int8 scores."""
    q, k = _rows(q), _rows(k)
    q8, q_scale = _quantise(q, None)
    k8, k_scale = _quantise(k, k.mean(1, dtype=torch.float32))
    return q8, k8, v, lse, q_scale, k_scale


def _quantise(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head = x.shape
    blocks = triton.cdiv(tokens, SCALE_BLOCK)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    quantise_kernel[(blocks, batch * heads)](
        x, mean, out, scale, _strides(x), tokens, heads, HEAD=head, BLOCK=SCALE_BLOCK, num_warps=QUANTISE_WARPS
    )
    return out, scale


def _quantise_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(v in fp8 [B * H, hd, padded S], scales [B, H, hd], means [B, H, hd]); one scale and one mean per channel."""
    batch, tokens, heads, head = v.shape
    mean = v.mean(1, dtype=torch.float32)
    lowest, highest = v.aminmax(dim=1)
    scale = torch.maximum(highest - mean, mean - lowest).clamp_min_(1e-8).div_(FP8_MAX)
    padded = triton.cdiv(tokens, SCALE_BLOCK) * SCALE_BLOCK
    out = torch.empty(batch * heads, head, padded, dtype=torch.float8_e4m3fn, device=v.device)
    quantise_values_kernel[(padded // VALUE_BLOCK, batch * heads)](
        v, mean, scale, out, _strides(v), tokens, padded, heads, HEAD=head, BLOCK=VALUE_BLOCK, num_warps=QUANTISE_WARPS
    )
    return out, scale, mean
