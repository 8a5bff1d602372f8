"""Attention rows: every exact core forward and backward, and the quantised modes, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import bench_libraries as libraries
import torch
from bench_cases import SAMPLED, Check, Work, sets
from bench_timing import Call, errors, on_poison
from torch import Tensor

import geoalign_kernels as gk
from geoalign.perf.devices import DeviceProfile, core_rates
from geoalign_kernels.ops.attention.cores import CORES, why_not
from geoalign_kernels.ops.attention.fp8_support import why_not_fp8

HEADS, HEAD = 12, 128
CHUNK = 1024
MATRIX_LIMIT = 8192
"""Longest sequence at which the plain reference, which holds blocks of scores in float32, is timed."""
QUANTISED = ("int8", "int8_fp8")
FLOAT64_FLOPS = 5e12
"""Assumed rate of exact gradients on the slowest card, passes over float64 scores included."""


@dataclass(frozen=True)
class AttentionCase:
    """One pair of lengths; the interface of `bench_cases.Case`."""

    queries: int
    keys: int
    operands: list[tuple[Tensor, Tensor, Tensor]]
    variant: str = ""
    gated: frozenset[str] = frozenset(CORES) - {"reference"}

    @property
    def name(self) -> str:
        """Self-attention or cross-attention."""
        return "attention" if self.queries == self.keys else "cross_attention"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(queries, keys, heads, head)."""
        return self.queries, self.keys, *self.operands[0][0].shape[2:]

    @property
    def buffers(self) -> int:
        """Sets of operands."""
        return len(self.operands)

    @property
    def work(self) -> dict[str, Work]:
        """4 Sq Sk H hd, the convention of the FlashAttention papers; a backward counts 2.5 times."""
        queries, keys, heads, head = self.shape
        flops = 4.0 * queries * keys * heads * head
        data = sum(t.nbytes for t in self.operands[0])
        # forward: q, k, v and O; backward: these, dO and the three gradients
        written = self.operands[0][0].nbytes
        return {"fwd": Work(data + written, flops), "bwd": Work(2.0 * data + 2.0 * written, 2.5 * flops)}

    @property
    def implementations(self) -> dict[str, str]:
        """`{row name: "" or the reason why it does not run here}`: the cores, then the quantised modes."""
        q = self.operands[0][0]
        reasons = {core: why_not(core, q.device, q.dtype) for core in CORES}
        if self.queries > MATRIX_LIMIT:
            reasons["reference"] = f"plain softmax is not timed above {MATRIX_LIMIT} queries"
        # on a CPU the self-check runs the reference of the quantised modes
        reasons |= {"int8": "", "int8_fp8": why_not_fp8(q.device) if q.device.type == "cuda" else ""}
        return reasons | {name: libraries.attention_absent(name, q.device) for name in libraries.ATTENTION}

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(implementation, direction) of every row; quantised modes and rivals have no backward here."""
        return [(impl, d) for impl in self.implementations for d in self.work if d == "fwd" or impl in CORES]

    def absent(self, impl: str) -> str:
        """Why an implementation is not there; empty if it is."""
        return self.implementations[impl]

    def first(self, impl: str) -> bool:
        """Whether a run is there for the rows of this implementation: the core that a training run takes, and ours."""
        q = self.operands[0][0]
        return impl in ("triton", *QUANTISED) or impl == gk.resolve_attention(q.device, q.dtype)

    def truth_s(self, direction: str) -> float:
        """Seconds of exact gradients: three products of all queries with all keys in float64."""
        queries, keys, heads, head = self.shape
        return 6.0 * queries * keys * heads * head / FLOAT64_FLOPS if direction == "bwd" else 0.0

    def predicted_ms(self, profile: DeviceProfile, impl: str, direction: str) -> float | None:
        """By the rates of the cost model for that very core; None where it has none."""
        modes = {"int8": profile.attention_int8, "int8_fp8": profile.attention_int8_fp8}
        core = core_rates(profile.target).get(impl)
        rate = modes.get(impl) if core is None else core.forward if direction == "fwd" else core.backward
        flops = self.work[direction].flops
        assert flops is not None
        return 1e3 * flops / rate if rate else None

    def prepare(self, impl: str, direction: str) -> tuple[Call, Check]:
        """(what to time, what gives its errors) of one row."""
        if direction == "fwd":

            def call(i: int) -> Tensor:
                with torch.no_grad():
                    return forward(impl, *self.operands[i])

            return call, lambda: errors(on_poison(call, self.operands[0])[:, self._queries], self._exact)
        leaves = [tuple(t.detach().requires_grad_() for t in operands) for operands in self.operands]
        results = [forward(impl, *operands) for operands in leaves]

        def backward(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(results[i], leaves[i], self._grad, retain_graph=True)

        def check() -> dict[str, float | None]:
            dq, dk, dv = on_poison(backward, [self._grad, *self.operands[0]])
            return errors([dq[:, self._queries], dk[:, self._keys], dv[:, self._keys]], list(self._gradients))

        return backward, check

    @cached_property
    def _queries(self) -> Tensor:
        return torch.randperm(self.queries, device=self.operands[0][0].device)[:SAMPLED]

    @cached_property
    def _keys(self) -> Tensor:
        return torch.randperm(self.keys, device=self.operands[0][0].device)[:SAMPLED]

    @cached_property
    def _grad(self) -> Tensor:
        return torch.randn_like(self.operands[0][0])

    @cached_property
    def _exact(self) -> Tensor:
        return exact_rows(*self.operands[0], self._queries)

    @cached_property
    def _gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return exact_gradients(*self.operands[0], self._grad, self._queries, self._keys)


def attention_cases(
    lengths: list[tuple[int, int]], heads: int, head: int, device: torch.device, dtype: torch.dtype
) -> Iterator[AttentionCase]:
    """Random operands for each (queries, keys)."""
    for queries, keys in lengths:
        make: Callable[[int], Tensor] = lambda n: torch.randn(1, n, heads, head, device=device).to(dtype)  # noqa: E731
        yield AttentionCase(queries, keys, sets(lambda: (make(queries), make(keys), make(keys)), device))  # noqa: B023


def forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output by the named row of `AttentionCase.implementations`."""
    if name in libraries.ATTENTION:
        rival = libraries.ATTENTION[name]()
        assert not isinstance(rival, str)
        return rival(q, k, v)
    if name in QUANTISED:
        return gk.attention(q, k, v, mode=name).out
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
