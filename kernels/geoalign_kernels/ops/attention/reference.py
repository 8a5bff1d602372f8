"""Definition of attention, of its backward from (O, LSE), and of the int8 quantisation, in plain torch.

Shapes: q [B, Sq, H, hd], k and v [B, Sk, H, hd], LSE [B, H, Sq] (natural logarithm). Queries are taken in blocks, so
that the scores never exist as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 1024


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.transpose(1, 2).to(dtype) for t in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(scale q k^T) v, log-sum-exp of the scores)."""
    queries, keys, values = _heads_first(q, k, v)
    outputs, sums = [], []
    for block in queries.split(QUERY_BLOCK, dim=2):
        scores = scale * (block @ keys.mT)
        sums.append(scores.logsumexp(-1))
        outputs.append((scores - sums[-1][..., None]).exp() @ values)
    if not outputs:
        return torch.empty_like(q), queries.new_empty(queries.shape[:3])
    return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype).contiguous(), torch.cat(sums, dim=2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) with probabilities rebuilt from LSE (FlashAttention, arXiv 2205.14135, appendix B)."""
    queries, keys, values, results, dout = _heads_first(q, k, v, out, grad)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, queries.shape[2], QUERY_BLOCK):
        at = slice(start, start + QUERY_BLOCK)
        p = (scale * (queries[:, :, at] @ keys.mT) - lse[:, :, at, None].to(queries)).exp()
        delta = (dout[:, :, at] * results[:, :, at]).sum(-1, keepdim=True)
        ds = scale * p * (dout[:, :, at] @ values.mT - delta)
        dq[:, :, at] = ds @ keys
        dk += ds.mT @ queries[:, :, at]
        dv += p.mT @ dout[:, :, at]
    return dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def quantise(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per block of tokens and head: (values [B, S, H, hd], scales [B, H, ceil(S / block)])."""
    value = x.float() - mean if mean is not None else x.float()
    padded = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, -value.shape[1] % block))
    blocks = padded.unflatten(1, (-1, block))  # [B, blocks, block, H, hd]
    scale = blocks.abs().amax(dim=(2, 4)).clamp_min(1e-8) / 127.0
    rounded = (blocks / scale[:, :, None, :, None]).round().clamp(-127, 127)
    return rounded.flatten(1, 2)[:, : x.shape[1]].to(torch.int8), scale.transpose(1, 2).contiguous()


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention on int8 q and k; the mean of k over tokens is taken off first, which softmax does not see."""
    mean = k.float().mean(1, keepdim=True)
    (q8, q_scale), (k8, k_scale) = quantise(q, None, 128), quantise(k, mean, 64)
    q_back = q8.float() * q_scale.transpose(1, 2).repeat_interleave(128, 1)[:, : q.shape[1], :, None]
    k_back = k8.float() * k_scale.transpose(1, 2).repeat_interleave(64, 1)[:, : k.shape[1], :, None]
    return forward(q_back, k_back, v.float(), scale)[0].to(q.dtype)
