"""The streaming ops at production shapes: operands, implementations, truth, bytes that must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import bench_rivals as rivals
import torch
from bench_timing import BUFFERS
from torch import Tensor

import geoalign_kernels as gk

HEADS, HEAD, PAIRS = 12, 128, 42
WIDTH = HEADS * HEAD
TABLE = (0.98, -0.04, 0.3, 0.0)
"""(a, b, c, d) of a stochastic step."""
SAMPLED = 256
"""Tokens whose results are compared with float64."""
Implementation = rivals.Implementation


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        name, shape: of the row in the result file.
        operands: `BUFFERS` sets of positional operands, used in turn.
        token_dims: for each operand the dimension that counts tokens, None if it has none.
        differentiable: operands that get a gradient in the backward rows.
        implementations: `{name: function, or the reason why it is absent}`.
        truth: the function in plain torch; called with float64 operands.
        bytes_min: `{direction: bytes}`, every operand once.
        prediction: `{implementation: memory traffic over bytes_min}` where the cost model has a figure.
        unchecked: implementations that draw their own random numbers.
    """

    name: str
    shape: tuple[int, ...]
    operands: list[tuple[Tensor, ...]]
    token_dims: tuple[int | None, ...]
    differentiable: tuple[int, ...]
    implementations: dict[str, Implementation | str]
    truth: Implementation
    bytes_min: dict[str, float]
    prediction: dict[str, float] = field(default_factory=dict)
    unchecked: frozenset[str] = frozenset()

    def sampled(self, rows: Tensor) -> list[Tensor]:
        """The first operand set in float64, cut to the tokens `rows`."""
        pairs = zip(self.operands[0], self.token_dims, strict=True)
        return [(t if dim is None else t.index_select(dim, rows)).double() for t, dim in pairs]


def row_cases(tokens: int, device: torch.device, dtype: torch.dtype, compiled_factor: float) -> Iterator[Case]:
    """Prologue, epilogue, norm and gate over `tokens` rows of 1536; one case at a time is in memory."""

    def rand(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind)

    def sets(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        return [make() for _ in range(BUFFERS)]

    def vector() -> Tensor:
        return 0.1 * rand(1, WIDTH, kind=torch.float32)

    def phase() -> Tensor:
        return rand(1, tokens, HEADS, PAIRS, kind=torch.float32)

    row = tokens * WIDTH * torch.empty((), dtype=dtype).element_size()
    angles = tokens * HEADS * PAIRS * 4
    ours_and_compiled = {"ours": 1.0, "compiled": compiled_factor}
    weight = (1.0 + 0.1 * rand(WIDTH, kind=torch.float32)).to(dtype)
    position = 20.0 * torch.rand(tokens, HEAD // 2, device=device)
    yield Case(
        "qk_norm_rotary",
        (tokens, HEADS, HEAD, PAIRS),
        sets(lambda: (*(rand(1, tokens, HEADS, HEAD) for _ in range(3)), weight, weight, position, phase(), phase())),
        (1, 1, 1, None, None, 0, 1, 1),
        (0, 1, 2, 3, 4, 6, 7),
        {
            "ours": _prologue,
            "eager": rivals.published_prologue,
            "compiled": rivals.compiled(rivals.rewritten_prologue, device),
            "liger": "Liger has no RMSNorm over all heads joined with 3-D positions and camera phases",
        },
        rivals.rewritten_prologue,
        {"fwd": 6 * row + 2 * angles, "bwd": 9 * row + 4 * angles},
        # RMSNorm 36, rotations 2 x 35.7 and 27.3 tensors, as the cost model counts the published code
        ours_and_compiled | {"eager": (36.0 + 2 * 35.7 + 27.3) * row / (6 * row + 2 * angles)},
    )
    yield Case(
        "unrotate_gate_norm",
        (tokens, WIDTH, PAIRS),
        sets(lambda: (rand(1, tokens, WIDTH), rand(1, tokens, WIDTH), vector(), vector(), vector(), phase())),
        (1, 1, None, None, None, 1),
        (0, 1, 5),
        {
            "ours": lambda y, x, g, a, b, p: gk.unrotate_gate_norm(y, x, g, a, b, phase=p, heads=HEADS),
            "eager": rivals.published_epilogue,
            "compiled": rivals.compiled(rivals.rewritten_epilogue, device),
        },
        rivals.rewritten_epilogue,
        {"fwd": 4 * row + angles, "bwd": 6 * row + 2 * angles},
        ours_and_compiled,
    )
    yield Case(
        "modulated_norm",
        (tokens, WIDTH),
        sets(lambda: (rand(1, tokens, WIDTH), vector(), vector())),
        (1, None, None),
        (0,),
        {
            "ours": gk.modulated_norm,
            "eager": rivals.published_norm,
            "compiled": rivals.compiled(rivals.rewritten_norm, device),
            "liger": rivals.liger_norm(),
        },
        rivals.rewritten_norm,
        {"fwd": 2 * row, "bwd": 3 * row},
        ours_and_compiled,
    )
    yield Case(
        "gated_residual",
        (tokens, WIDTH),
        sets(lambda: (rand(1, tokens, WIDTH), rand(1, tokens, WIDTH), vector())),
        (1, 1, None),
        (0, 1),
        {
            "ours": gk.gated_residual,
            "eager": rivals.published_gate,
            "compiled": rivals.compiled(rivals.rewritten_gate, device),
        },
        rivals.rewritten_gate,
        {"fwd": 3 * row, "bwd": 2 * row},
        ours_and_compiled,
    )


def _prologue(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, position: Tensor, *phases: Tensor) -> Any:
    return gk.qk_norm_rotary(q, k, v, wq, wk, position, phase_qk=phases[0], phase_vo=phases[1])


def flow_cases(samples: int, elements: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The stochastic step with its density, and the density alone as the learner replays it."""

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(samples, elements, device=device), torch.randn(samples, elements, device=device).to(dtype)

    key = gk.NoiseKey(0, 0, 0, torch.arange(samples, device=device), 0)
    a, b, c, _ = TABLE
    count, wide = samples * elements, torch.empty((), dtype=dtype).element_size()

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
        "flow_step",
        (samples, elements),
        [make() for _ in range(BUFFERS)],
        (None, None),
        (),
        {
            "ours": lambda x, v: tuple(gk.flow_step(x, v, TABLE, key=key)),
            "eager": eager,
            "compiled": rivals.compiled(eager, device),
        },
        truth,
        {"fwd": (2 * (4 + wide + 4)) * count},
        {"ours": 1.0},
        frozenset({"eager", "compiled"}),
    )
    states = [(*pair, a * pair[0] + c * torch.randn_like(pair[0])) for pair in (make() for _ in range(BUFFERS))]
    yield Case(
        "flow_log_prob",
        (samples, elements),
        states,
        (None, None, None),
        (1,),
        {
            "ours": lambda x, v, x_next: gk.flow_log_prob(x, v, x_next, TABLE),
            "eager": density,
            "compiled": rivals.compiled(density, device),
        },
        density,
        {"fwd": (4 + wide + 4) * count, "bwd": (4 + wide + 4 + wide) * count},
        {"ours": 1.0},
    )
