"""What `bench_ops.py` measures: the form of a case, and the streaming ops at production shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import bench_libraries as libraries
import bench_rivals as rivals
import torch
from bench_timing import Call, buffers_for, errors, on_poison
from torch import Tensor

import geoalign_kernels as gk
from geoalign.perf.devices import DeviceProfile

HEADS, HEAD, PAIRS = 12, 128, 42
WIDTH = HEADS * HEAD
TABLE = (0.98, -0.04, 0.3, 0.0)
"""(a, b, c, d) of a stochastic step."""
SAMPLED = 256
"""Tokens whose results are compared with float64."""
FORWARD_ONLY = ("flashinfer", "sgl_kernel", "sglang")
Implementation = rivals.Implementation
Check = Callable[[], dict[str, float | None]]


@dataclass(frozen=True)
class Work:
    """Bytes that must move (every operand once) and FLOPs of one direction."""

    bytes_min: float | None = None
    flops: float | None = None


class Deferred(NamedTuple):
    """An implementation that is built when its row is measured, because building it takes long."""

    make: Callable[[], Implementation]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        name, variant, shape: of the row in the result file.
        operands: sets of positional operands, used in turn.
        implementations: `{name: function, or the reason why it is absent}`.
        truth: the function in plain torch, called with operands in float64.
        work: `{direction: Work}`; its keys are the directions measured.
        token_dims: for each operand the dimension that counts tokens, None if it has none; a few tokens are compared.
        output_dim: the dimension that counts tokens in the results.
        differentiable: operands that get a gradient in the backward rows.
        traffic: `{implementation: memory traffic over bytes_min}` where the cost model has a figure.
        rates: `{implementation: attribute of DeviceProfile}` where FLOPs decide.
        unchecked: implementations that draw their own random numbers.
        gated: implementations whose error must stay below the gate.
    """

    name: str
    variant: str
    shape: tuple[int, ...]
    operands: list[tuple[Tensor, ...]]
    implementations: Mapping[str, Implementation | Deferred | str]
    truth: Implementation
    work: dict[str, Work]
    token_dims: tuple[int | None, ...]
    output_dim: int = 1
    differentiable: tuple[int, ...] = ()
    traffic: dict[str, float] = field(default_factory=dict)
    rates: dict[str, str] = field(default_factory=dict)
    unchecked: frozenset[str] = frozenset()
    gated: frozenset[str] = frozenset({"ours"})

    @property
    def buffers(self) -> int:
        """Sets of operands."""
        return len(self.operands)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(implementation, direction) of every row; some libraries have no backward."""
        return [
            (impl, direction)
            for impl in self.implementations
            for direction in self.work
            if direction == "fwd" or impl not in FORWARD_ONLY
        ]

    def absent(self, impl: str) -> str:
        """Why an implementation is not there; empty if it is."""
        found = self.implementations[impl]
        return found if isinstance(found, str) else ""

    def first(self, impl: str) -> bool:
        """Whether a run is there for the rows of this implementation."""
        return impl == "ours"

    def truth_s(self, direction: str) -> float:
        """Seconds of the exact results beyond those of any case: a few tokens cost nothing."""
        return 0.0

    def predicted_ms(self, profile: DeviceProfile, impl: str, direction: str) -> float | None:
        """What the cost model says, None where it has no figure."""
        work = self.work[direction]
        if impl in self.rates and work.flops:
            return 1e3 * work.flops / getattr(profile, self.rates[impl])
        # A published backward has no figure: only forward traffic was counted for the eager code.
        if impl in self.traffic and work.bytes_min and (impl != "eager" or direction == "fwd"):
            return 1e3 * self.traffic[impl] * work.bytes_min / profile.bandwidth
        return None

    def prepare(self, impl: str, direction: str) -> tuple[Call, Check]:
        """(what to time, what gives its errors) of one row."""
        function = self.implementations[impl]
        if isinstance(function, Deferred):
            function = function.make()
        assert not isinstance(function, str)
        if direction == "fwd":
            return self._forward(impl, function)
        return self._backward(function)

    def _forward(self, impl: str, function: Implementation) -> tuple[Call, Check]:
        def call(i: int) -> Any:
            with torch.no_grad():
                return function(*self.operands[i])

        def check() -> dict[str, float | None]:
            if impl in self.unchecked:
                return {"rel_l2": None, "max_abs": None}
            tokens = self._tokens()
            exact, pick = self._sampled(tokens), self._pick(tokens)
            with torch.no_grad():
                return errors([pick(o) for o in _leaves(on_poison(call, self.operands[0]))], self.truth(*exact))

        return call, check

    def _backward(self, function: Implementation) -> tuple[Call, Check]:
        leaves = [list(operands) for operands in self.operands]
        for operands in leaves:
            for i in self.differentiable:
                operands[i] = operands[i].detach().requires_grad_()
        results = [_leaves(function(*operands)) for operands in leaves]
        weights = [torch.randn_like(o) for o in results[0]]

        def call(i: int) -> Any:
            wanted = [leaves[i][j] for j in self.differentiable]
            return torch.autograd.grad(results[i], wanted, weights, retain_graph=True)

        def check() -> dict[str, float | None]:
            tokens = self._tokens()
            exact, pick = self._sampled(tokens), self._pick(tokens)
            # The gradient of a vector needs all tokens; those of tokens are exact on the sampled ones.
            by_token = [i for i in self.differentiable if self.token_dims[i] is not None] or list(self.differentiable)
            for i in by_token:
                exact[i].requires_grad_()
            truth = torch.autograd.grad(
                _leaves(self.truth(*exact)),
                [exact[i] for i in by_token],
                [pick(w).double() for w in weights],
            )
            got = dict(zip(self.differentiable, on_poison(call, [*weights, *self.operands[0]]), strict=True))
            return errors([pick(got[i]) for i in by_token], list(truth))

        return call, check

    def _tokens(self) -> Tensor | None:
        counts = [t.shape[dim] for t, dim in zip(self.operands[0], self.token_dims, strict=True) if dim is not None]
        if not counts:
            return None
        return torch.randperm(counts[0], device=self.operands[0][0].device)[:SAMPLED]

    def _sampled(self, tokens: Tensor | None) -> list[Tensor]:
        pairs = zip(self.operands[0], self.token_dims, strict=True)
        return [(t if dim is None else t.index_select(dim, tokens)).double() for t, dim in pairs]

    def _pick(self, tokens: Tensor | None) -> Callable[[Tensor], Tensor]:
        return (lambda t: t) if tokens is None else lambda t: t.index_select(self.output_dim, tokens)


def _leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def sets(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """As many sets of operands as it takes to leave nothing of them in the L2 cache."""
    first = make()
    return [first, *(make() for _ in range(buffers_for(sum(t.nbytes for t in first), device) - 1))]


def row_cases(
    tokens: int, device: torch.device, dtype: torch.dtype, streams: tuple[torch.dtype, ...], compiled_factor: float
) -> Iterator[Case]:
    """Prologue, norms, epilogue and gate over `tokens` rows of 1536: 11 GB of operands at 65,520 and float32.

    `streams` are the dtypes of the residual stream, `dtype` that of all else but the float32 modulation.
    """

    def rand(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind)

    def phase() -> Tensor:
        return rand(1, tokens, HEADS, PAIRS)

    known = {"ours": 1.0, "compiled": compiled_factor}
    weight, row = (1.0 + 0.1 * rand(WIDTH, kind=torch.float32)).to(dtype), tokens * WIDTH * dtype.itemsize
    yield _prologue(tokens, rand, phase, weight, device, known)
    yield Case(
        "rms_norm", "", (tokens, WIDTH), sets(lambda: (rand(1, tokens, WIDTH), weight), device),
        {
            "ours": gk.rms_norm, "eager": rivals.published_rms_norm,
            "compiled": rivals.compiled(rivals.rewritten_rms_norm, device),
            "torch": lambda x, w: torch.nn.functional.rms_norm(x, (WIDTH,), w, rivals.EPS),
            "liger": libraries.liger_rms_norm(rivals.EPS), "flashinfer": libraries.flashinfer_rms_norm(rivals.EPS),
            "sgl_kernel": libraries.sgl_rms_norm(rivals.EPS),
        },
        rivals.rewritten_rms_norm, {"fwd": Work(2 * row), "bwd": Work(3 * row)}, (1, None),
        differentiable=(0,), traffic=known | {"eager": 9.0},
    )  # fmt: skip
    for stream in streams:
        yield from _stream_cases(tokens, rand, phase, dtype, stream, device, known)


def _stream_cases(
    tokens: int, rand: Callable[..., Tensor], phase: Callable[[], Tensor], dtype: torch.dtype, stream: torch.dtype,
    device: torch.device, known: dict[str, float],
) -> Iterator[Case]:  # fmt: skip
    def vector() -> Tensor:
        return 0.1 * rand(1, WIDTH, kind=torch.float32)

    row, long = (tokens * WIDTH * kind.itemsize for kind in (dtype, stream))
    angles = tokens * HEADS * PAIRS * dtype.itemsize
    same, variant = stream == dtype, "float32 stream" if stream != dtype else ""
    yield Case(
        "unrotate_gate_norm", variant, (tokens, WIDTH, PAIRS),
        sets(lambda: (rand(1, tokens, WIDTH), rand(1, tokens, WIDTH, kind=stream), vector(), vector(), vector(),
                      phase()), device),
        {
            "ours": lambda y, x, g, a, b, p: gk.unrotate_gate_norm(y, x, g, a, b, phase=p, heads=HEADS, dtype=dtype),
            "eager": rivals.published_epilogue,
            "compiled": rivals.compiled(rivals.rewritten_epilogue(dtype), device),
        },
        rivals.rewritten_epilogue(torch.float64),
        {"fwd": Work(2 * row + 2 * long + angles), "bwd": Work(3 * row + 3 * long + 2 * angles)},
        (1, 1, None, None, None, 1), differentiable=(0, 1, 5), traffic=known,
    )  # fmt: skip
    yield Case(
        "modulated_norm", variant, (tokens, WIDTH),
        sets(lambda: (rand(1, tokens, WIDTH, kind=stream), vector(), vector()), device),
        {
            "ours": lambda x, a, b: gk.modulated_norm(x, a, b, dtype=dtype),
            "eager": lambda x, a, b: rivals.published_norm(x, a, b, dtype),
            "compiled": rivals.compiled(rivals.rewritten_norm(dtype), device),
            "liger": libraries.liger_norm(rivals.EPS) if same else "Liger's LayerNorm returns the dtype it reads",
            "sglang": libraries.sglang_norm(rivals.EPS) if same else "SGLang's modulation returns the dtype it reads",
        },
        rivals.rewritten_norm(torch.float64), {"fwd": Work(row + long), "bwd": Work(row + 2 * long)}, (1, None, None),
        differentiable=(0,), traffic=known,
    )  # fmt: skip
    yield Case(
        "gated_residual", variant, (tokens, WIDTH),
        sets(lambda: (rand(1, tokens, WIDTH, kind=stream), rand(1, tokens, WIDTH), vector()), device),
        {
            "ours": gk.gated_residual,
            "eager": rivals.published_gate,
            "compiled": rivals.compiled(rivals.rewritten_gate, device),
        },
        rivals.rewritten_gate, {"fwd": Work(2 * long + row), "bwd": Work(long + row)}, (1, 1, None),
        differentiable=(0, 1), traffic=known,
    )  # fmt: skip


def _prologue(
    tokens: int, rand: Callable[..., Tensor], phase: Callable[[], Tensor], weight: Tensor, device: torch.device,
    known: dict[str, float],
) -> Case:  # fmt: skip
    position = 20.0 * torch.rand(tokens, HEAD // 2, device=device)
    row, angles = tokens * WIDTH * weight.itemsize, tokens * HEADS * PAIRS * weight.itemsize
    forward, published = 6 * row + 2 * angles, 36.0 + 2 * 35.7 + 27.3

    def ours(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, at: Tensor, *phases: Tensor) -> Any:
        return gk.qk_norm_rotary(q, k, v, wq, wk, at, phase_qk=phases[0], phase_vo=phases[1])

    return Case(
        "qk_norm_rotary", "", (tokens, HEADS, HEAD, PAIRS),
        sets(lambda: (*(rand(1, tokens, HEADS, HEAD) for _ in range(3)), weight, weight, position, phase(), phase()),
             device),
        {
            "ours": ours,
            "eager": rivals.published_prologue,
            "compiled": rivals.compiled(rivals.rewritten_prologue, device),
            "liger": "Liger has no RMSNorm over all heads joined with 3-D positions and camera phases",
        },
        rivals.rewritten_prologue, {"fwd": Work(forward), "bwd": Work(9 * row + 4 * angles)},
        (1, 1, 1, None, None, 0, 1, 1), differentiable=(0, 1, 2, 3, 4, 6, 7),
        # RMSNorm 36, rotations 2 x 35.7 and 27.3 tensors, as the cost model counts the published code
        traffic=known | {"eager": published * row / forward},
    )  # fmt: skip


def flow_cases(samples: int, elements: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The stochastic step with its density, and the density alone as the learner replays it."""

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(samples, elements, device=device), torch.randn(samples, elements, device=device).to(dtype)

    ids = torch.arange(samples, device=device)
    key = gk.NoiseKey(0, 0, torch.zeros_like(ids), ids, 0)
    a, b, c, _ = TABLE
    count, wide = samples * elements, dtype.itemsize

    def density(x: Tensor, velocity: Tensor, x_next: Tensor) -> Tensor:
        normal = torch.distributions.Normal(a * x + b * velocity, c, validate_args=False)
        return normal.log_prob(x_next).mean(1)

    def eager(x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        x_next = a * x + b * velocity + c * torch.randn_like(x)
        return x_next, density(x, velocity, x_next)

    def truth(x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        x_next = a * x + b * velocity + c * gk.philox_normal((elements,), key).to(x)
        return x_next, density(x, velocity, x_next)

    yield Case(
        "flow_step", "", (samples, elements), sets(make, device),
        {
            "ours": lambda x, v: tuple(gk.flow_step(x, v, TABLE, key=key)),
            "eager": eager,
            "compiled": rivals.compiled(eager, device),
        },
        truth, {"fwd": Work(2 * (4 + wide + 4) * count)}, (None, None), traffic={"ours": 1.0},
        unchecked=frozenset({"eager", "compiled"}),
    )  # fmt: skip

    def states() -> tuple[Tensor, ...]:
        x, velocity = make()
        return x, velocity, a * x + c * torch.randn_like(x)

    yield Case(
        "flow_log_prob", "", (samples, elements), sets(states, device),
        {
            "ours": lambda x, v, x_next: gk.flow_log_prob(x, v, x_next, TABLE),
            "eager": density,
            "compiled": rivals.compiled(density, device),
        },
        density, {"fwd": Work((4 + wide + 4) * count), "bwd": Work((4 + wide + 4 + wide) * count)},
        (None, None, None), differentiable=(1,), traffic={"ours": 1.0},
    )  # fmt: skip
