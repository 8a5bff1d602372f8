"""Definition of attention, of its backward from (O, LSE), and of the quantised forms, in plain torch.

Shapes: q [B, Sq, H, hd], k and v [B, Sk, H, hd], LSE [B, H, Sq] (natural logarithm). Queries are taken in blocks, so
that the scores never exist as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.rows import working_dtype

ROW_BLOCK = 1024
SCALE_BLOCK = 128
"""Tokens of a head that share an int8 scale."""
FP8_MAX = 448.0
"""Largest e4m3 number: the scale of the probabilities, which are at most 1."""


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    dtype = working_dtype(tensors[0])
    return [t.transpose(1, 2).to(dtype) for t in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(scale q k^T) v, log-sum-exp of the scores)."""
    queries, keys, values = _heads_first(q, k, v)
    outputs, sums = [], []
    for block in queries.split(ROW_BLOCK, dim=2):
        scores = scale * (block @ keys.mT)
        sums.append(scores.logsumexp(-1))
        outputs.append((scores - sums[-1][..., None]).exp() @ values)
    if not outputs:
        return torch.empty_like(q), queries.new_empty(queries.shape[:3])
    return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype), torch.cat(sums, dim=2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) with probabilities rebuilt from LSE (FlashAttention, arXiv 2205.14135, appendix B)."""
    queries, keys, values, results, dout = _heads_first(q, k, v, out, grad)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, queries.shape[2], ROW_BLOCK):
        at = slice(start, start + ROW_BLOCK)
        p = (scale * (queries[:, :, at] @ keys.mT) - lse[:, :, at, None].to(queries)).exp()
        delta = (dout[:, :, at] * results[:, :, at]).sum(-1, keepdim=True)
        ds = scale * p * (dout[:, :, at] @ values.mT - delta)
        dq[:, :, at] = ds @ keys
        dk += ds.mT @ queries[:, :, at]
        dv += p.mT @ dout[:, :, at]
    return dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def _through_int8(x: Tensor) -> Tensor:
    """x after symmetric int8 quantisation per block of tokens and head, and back."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % SCALE_BLOCK))
    blocks = padded.unflatten(1, (-1, SCALE_BLOCK))  # [B, blocks, SCALE_BLOCK, H, hd]
    scale = blocks.abs().amax(dim=(2, 4), keepdim=True).clamp_min(1e-8) / 127.0
    return ((blocks / scale).round().clamp(-127, 127) * scale).flatten(1, 2)[:, : x.shape[1]]


def _int8_scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k through int8; the mean of k over tokens is taken off first, which softmax does not see."""
    return _through_int8(q.float()), _through_int8(k.float() - k.float().mean(1, keepdim=True))


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention on int8 q and k (SageAttention, arXiv 2410.02367)."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    return forward(*_int8_scores(q, k), v.float(), scale)[0].to(q.dtype)


def attention_int8_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention on int8 q and k, with probabilities and values in fp8 e4m3 (SageAttention2, arXiv 2411.10958).

    Probabilities relative to the largest of a row are at most 1 and take the fixed scale 448; the row sum is that of
    the unrounded ones. Each channel of v has its mean taken off, which the weights, summing to 1, give back, and its
    own scale.
    """
    if k.shape[1] == 0 or q.numel() == 0:
        return torch.zeros_like(q)
    queries, keys, values = _heads_first(*_int8_scores(q, k), v.float())
    mean = values.mean(2, keepdim=True)
    centred = values - mean
    channel = centred.abs().amax(2, keepdim=True).clamp_min(1e-8) / FP8_MAX
    rounded = (centred / channel).to(torch.float8_e4m3fn).float() * channel
    outputs = []
    for block in queries.split(ROW_BLOCK, dim=2):
        scores = scale * (block @ keys.mT)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        p8 = (FP8_MAX * p).to(torch.float8_e4m3fn).float() / FP8_MAX
        outputs.append((p8 @ rounded) / p.sum(-1, keepdim=True) + mean)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype)
