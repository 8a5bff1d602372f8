"""Triton attention forward, exact and quantised: one streaming-softmax kernel, and the quantisers of its operands.

Tiles are fixed per architecture and never tuned at run time: ranks that tune apart would round apart. On sm_80 each
warp has 32 rows of queries, because every fragment of keys and values is read from shared memory once for each 16 rows:
with sixteen a warp the kernel waits for shared memory, not for the tensor cores. That leaves registers for 32 keys. On
sm_90 the tensor cores read shared memory themselves, and work while a warp does something else: with 64 keys the
registers hold two blocks of scores. With fp8 values, each of whose blocks is summed by itself, they do not.

Shapes in the bodies: M queries of a tile, N keys of a block, D channels of a head, S tokens quantised together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoalign_kernels.dispatch import BackendUnavailableError, UnsupportedInput, interpreting
from geoalign_kernels.ops.attention import fp8_support
from geoalign_kernels.ops.attention.reference import FP8_MAX, SCALE_BLOCK

LOG2E = 1.4426950408889634
HEADS = (16, 32, 64, 128)
QUANTISED_HEADS = (32, 64, 128)
"""An 8-bit product sums over at least 32."""
QUERY_BLOCK, STAGES = 128, 3


class Tile(NamedTuple):
    """What is fixed per architecture.

    Attributes:
        keys: of a block.
        warps: of a program.
        ahead: whether the scores of the next block are under way during the softmax of this one.
    """

    keys: int
    warps: int
    ahead: bool


TILES = {80: Tile(32, 4, False), 90: Tile(64, 8, True)}
FP8_TILE = Tile(128, 8, False)
VALUE_BLOCK, QUANTISE_WARPS = 64, 8
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_LOG2_FP8_MAX = tl.constexpr(math.log2(FP8_MAX))


@triton.jit
def _keys(start, tokens_k, BN: tl.constexpr, FIRST: tl.constexpr):
    """Keys of a block. Those that do not exist are read as the last one, which needs no mask on the loads."""
    return tl.minimum(tl.arange(0, BN), tokens_k - 1 - start) if FIRST else tl.arange(0, BN)


@triton.jit
def _scores(
    q, K, KScale, start, tokens_k, k_stride, factor, HEAD: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """(q k^T of one key block [M, N], factor that makes them exponents of 2)."""
    # 64-bit offsets only in the scalar base: in the tile they would cost the registers that sm_80 lacks.
    K += tl.cast(start, tl.int64) * k_stride
    rows = _keys(start, tokens_k, BN, FIRST)
    k = tl.load(K + rows[None, :] * k_stride + tl.arange(0, HEAD)[:, None])  # [D, N]
    if KScale is not None:
        factor *= tl.load(KScale + start // _SCALE_BLOCK)
        scores = tl.dot(q, k).to(tl.float32)
    else:
        scores = tl.dot(q, k, input_precision="ieee")
    if FIRST:
        scores = tl.where((start + tl.arange(0, BN) < tokens_k)[None, :], scores, float("-inf"))
    return scores, factor


@triton.jit
def _absorb(
    acc, highest, total, scores, factor, V, start, tokens_k, v_stride,
    HEAD: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One key block of the streaming softmax in base 2; ``highest`` is in units of factor * score."""
    # The factor is positive, so it may follow the maximum, and scaling the scores is one multiply-add of the exponent.
    new_highest = tl.max(scores, 1) * factor  # [M]
    if not FIRST:
        new_highest = tl.maximum(highest, new_highest)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink
        acc = acc * shrink[:, None]
    # fp8 probabilities reach up to the largest fp8 number; so does their sum, which divides it out again.
    shift = new_highest - _LOG2_FP8_MAX if FP8 else new_highest
    p = tl.exp2(scores * factor - shift[:, None])  # [M, N]
    total += tl.sum(p, 1)
    d = tl.arange(0, HEAD)
    if FP8:
        # fp8 products exist for operands whose summed dimension is contiguous: v is [channels, keys] here, padded.
        v = tl.load(V + start + tl.arange(0, BN)[:, None] + d[None, :] * v_stride)  # [N, D]
        # The tensor cores keep fewer bits than float32 while they sum fp8 products (SageAttention2, arXiv 2411.10958):
        # each block is summed by itself and added in float32.
        acc += tl.dot(p.to(v.dtype), v)
    else:
        V += tl.cast(start, tl.int64) * v_stride
        v = tl.load(V + _keys(start, tokens_k, BN, FIRST)[:, None] * v_stride + d[None, :])  # [N, D]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_highest, total


@triton.jit
def attention_kernel(
    Q, K, V, Out, Lse, QScale, KScale, VScale, VMean, q_strides, k_strides, v_strides, tokens_q, tokens_k, scale_log2,
    heads, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """v is [B, S, H, HEAD], or with VScale an fp8 [B * H, HEAD, padded S] of strides (head, channel).

    Without ``v_strides`` v lies in memory as k does: offsets in common save registers that sm_80 lacks.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    first = tl.program_id(0).to(tl.int64) * BM
    m, d = tl.arange(0, BM), tl.arange(0, HEAD)  # [M], [D]
    ok = m < tokens_q - first
    Q += b * q_strides[0] + h * HEAD + first * q_strides[1]
    q = tl.load(Q + m[:, None] * q_strides[1] + d[None, :], mask=ok[:, None], other=0)
    K += b * k_strides[0] + h * HEAD
    if v_strides is None:
        V += b * k_strides[0] + h * HEAD
        v_stride = k_strides[1]
    else:
        V += tl.program_id(1).to(tl.int64) * v_strides[0] if VScale is not None else b * v_strides[0] + h * HEAD
        v_stride = v_strides[1]
    factor = scale_log2
    if QScale is not None:
        factor *= tl.load(QScale + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        KScale += tl.program_id(1) * tl.cdiv(tokens_k, _SCALE_BLOCK)
    acc, total = tl.zeros((BM, HEAD), tl.float32), tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    # The last block, the only one with keys that do not exist, comes first: its mask takes no registers from the sums.
    last = (tokens_k - 1) // BN * BN
    scores, exponent = _scores(q, K, KScale, last, tokens_k, k_strides[1], factor, HEAD, BN, True)
    acc, highest, total = _absorb(
        acc, highest, total, scores, exponent, V, last, tokens_k, v_stride, HEAD, BN, VScale is not None, True
    )  # fmt: skip
    if not AHEAD:
        for start in range(0, last, BN):
            scores, exponent = _scores(q, K, KScale, start, tokens_k, k_strides[1], factor, HEAD, BN, False)
            acc, highest, total = _absorb(
                acc, highest, total, scores, exponent, V, start, tokens_k, v_stride, HEAD, BN, VScale is not None, False
            )  # fmt: skip
    elif last > 0:
        # The next scores are under way while this block goes through its softmax.
        scores, exponent = _scores(q, K, KScale, 0, tokens_k, k_strides[1], factor, HEAD, BN, False)
        for start in range(BN, last, BN):
            following, next_exponent = _scores(q, K, KScale, start, tokens_k, k_strides[1], factor, HEAD, BN, False)
            acc, highest, total = _absorb(
                acc, highest, total, scores, exponent, V, start - BN, tokens_k, v_stride, HEAD, BN,
                VScale is not None, False,
            )  # fmt: skip
            scores, exponent = following, next_exponent
        acc, highest, total = _absorb(
            acc, highest, total, scores, exponent, V, last - BN, tokens_k, v_stride, HEAD, BN, VScale is not None, False
        )  # fmt: skip
    out = acc / total[:, None]  # [M, D]
    if VScale is not None:
        channel = tl.program_id(1) * HEAD + d
        out = out * tl.load(VScale + channel)[None, :] + tl.load(VMean + channel)[None, :]
    Out += ((b * tokens_q + first) * heads + h) * HEAD
    tl.store(Out + m[:, None] * (heads * HEAD) + d[None, :], out.to(Out.dtype.element_ty), mask=ok[:, None])
    if Lse is not None:
        lse = (highest + tl.log2(total)) * 0.6931471805599453
        tl.store(Lse + tl.program_id(1).to(tl.int64) * tokens_q + first + m, lse, mask=ok)


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


def tile(device: torch.device, *, fp8: bool) -> Tile:
    """sm_90's tile on compute capability 9.x, sm_80's elsewhere and in the interpreter."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return FP8_TILE if fp8 else TILES[90 if hopper else 80]


def _launch(q, k, v, lse, q_scale, k_scale, v_scale, v_mean, scale, dtype):
    batch, tokens, heads, head = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    stages = 1 if interpreting() else STAGES
    keys, warps, ahead = tile(q.device, fp8=v_scale is not None)
    v_strides = None if v_scale is None and _strides(v) == _strides(k) else _strides(v)
    attention_kernel[(triton.cdiv(tokens, QUERY_BLOCK), batch * heads)](
        q, k, v, out, lse, q_scale, k_scale, v_scale, v_mean, _strides(q), _strides(k), v_strides, tokens,
        k.shape[1], scale * LOG2E, heads, HEAD=head, BM=QUERY_BLOCK, BN=keys, AHEAD=ahead,
        num_warps=warps, num_stages=stages,
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
    reason = fp8_support.why_not_fp8(q.device)
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
