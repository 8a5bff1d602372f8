"""Attention rows: every exact core forward and backward, and int8, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import geoalign_kernels as gk
from geoalign_kernels.ops.attention.cores import CORES, why_not

HEADS, HEAD = 12, 128
CHUNK = 1024
MATRIX_LIMIT = 8192
"""Longest sequence at which the plain reference, which holds blocks of scores in float32, is timed."""


@dataclass(frozen=True)
class AttentionCase:
    """One pair of lengths: operands, sampled query rows, and their exact results."""

    queries: int
    keys: int
    operands: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(queries, keys, heads, head)."""
        return self.queries, self.keys, *self.operands[0][0].shape[2:]

    @property
    def forward_flops(self) -> float:
        """4 Sq Sk H hd, the convention of the FlashAttention papers; a backward counts 2.5 times."""
        queries, keys, heads, head = self.shape
        return 4.0 * queries * keys * heads * head

    @property
    def bytes_min(self) -> float:
        """Reads of q, k, v and the write of O."""
        return float(sum(t.nbytes for t in self.operands[0]) + self.operands[0][0].nbytes)


def attention_cases(
    lengths: list[tuple[int, int]], heads: int, head: int, buffers: int, device: torch.device, dtype: torch.dtype
) -> Iterator[AttentionCase]:
    """Random operands for each (queries, keys)."""
    for queries, keys in lengths:
        make: Callable[[int], Tensor] = lambda n: torch.randn(1, n, heads, head, device=device).to(dtype)  # noqa: E731
        yield AttentionCase(queries, keys, [(make(queries), make(keys), make(keys)) for _ in range(buffers)])


def implementations(device: torch.device, dtype: torch.dtype, queries: int) -> dict[str, str]:
    """`{row name: "" or the reason why it does not run here}`: the cores, then int8."""
    reasons = {core: why_not(core, device, dtype) for core in CORES}
    if queries > MATRIX_LIMIT:
        reasons["reference"] = f"plain softmax is not timed above {MATRIX_LIMIT} queries"
    return reasons | {"int8": "", "sage": "SageAttention has no adapter here; its published charts are the comparison"}


def forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output by the named row of `implementations`."""
    if name == "int8":
        return gk.attention(q, k, v, mode="int8").out
    return gk.attention(q, k, v, core=name).out


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Float64 attention of the query rows `rows`: [1, rows, H, hd], one head at a time."""
    outputs = []
    for h in range(q.shape[2]):
        scores = q[0, rows, h].double() @ k[0, :, h].double().T * q.shape[3] ** -0.5
        outputs.append(scores.softmax(-1) @ v[0, :, h].double())
    return torch.stack(outputs, dim=1)[None]


def exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 (dq at the query rows, dk and dv at the key rows `columns`), each [1, n, H, hd].

    dq of a row needs that row of probabilities only. dk and dv of a key need its column, and hence the normaliser and
    the row sum P . dP of every query: those are taken in blocks of queries.
    """
    scale, parts = q.shape[3] ** -0.5, []
    for h in range(q.shape[2]):
        queries, keys, values, dout = (t[0, :, h].double() for t in (q, k, v, grad))
        dq = torch.zeros(rows.numel(), q.shape[3], dtype=torch.float64, device=q.device)
        dk, dv = (torch.zeros(columns.numel(), q.shape[3], dtype=torch.float64, device=q.device) for _ in range(2))
        for start in range(0, queries.shape[0], CHUNK):
            at = slice(start, start + CHUNK)
            p = (scale * queries[at] @ keys.T).softmax(-1)
            ds = p * (dout[at] @ values.T - (dout[at] * (p @ values)).sum(-1, keepdim=True)) * scale
            dv += p[:, columns].T @ dout[at]
            dk += ds[:, columns].T @ queries[at]
            inside = (rows >= start) & (rows < start + CHUNK)
            dq[inside] = ds[rows[inside] - start] @ keys
        parts.append((dq, dk, dv))
    return tuple(torch.stack(items, dim=1)[None] for items in zip(*parts, strict=True))
