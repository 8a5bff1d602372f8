"""A learner small enough for float64 and by hand: a toy policy, its rollout, the gradient of one update."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from conditions import Cond
from torch import Tensor, nn

from geoalign.config.flow import FlowConfig, ObjectiveConfig
from geoalign.config.training import OptimConfig
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.rl.objective import loss_weights
from geoalign.training.engines.replicated import ReplicatedEngine
from geoalign.training.learner import Learner
from geoalign.training.processes.ranks import LocalRanks
from geoalign.training.streaming import RowGradients, StreamingBackward

GROUPS, SIZE = 2, 6


class Toy(nn.Module):
    """A float64 velocity; like the camera gains, one trained part acts on the condition alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64) / 3)
        self.gain = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def precompute(self, conditioning: Cond) -> Cond:
        return conditioning

    def velocity(self, x: Tensor, timestep: Tensor, precomputed: Cond) -> Tensor:
        shift = torch.tanh(precomputed.z * self.gain)
        return torch.tanh(x @ self.inner + shift + timestep[:, None] / 1000) - 0.3 * x


def learner_of(policy: Toy, objective: ObjectiveConfig | None = None, **changes: Any) -> Learner:
    """A learner of its own policy: an engine takes the gradients that arrive, so a second one needs a copy."""
    trained = dict(policy.named_parameters())
    engine = ReplicatedEngine(trained, OptimConfig(grad_clip=1e9, lr=1e-30), LocalRanks(), torch.float64)
    objective = objective or ObjectiveConfig(clip=1e-4)
    return Learner(policy=policy, engine=engine, ranks=LocalRanks(), objective=objective, **changes)  # type: ignore[arg-type]


def setting_of(
    buffers: str | None,
    rows_per_forward: int | None = None,
    share_prefix: bool = True,
    positions: Sequence[int] = (0, 1, 2),
) -> SimpleNamespace:
    """A toy policy, its rollout of a window of three steps with a stream that watched it, advantages."""
    policy, generator = Toy(), torch.Generator().manual_seed(1)
    sampler = FlowSampler(build_step_table(FlowConfig(steps=8), StepWindow(2, 5)), SIZE, share_prefix, rows_per_forward)
    conditioning = Cond(torch.randn(GROUPS, 8, generator=generator, dtype=torch.float64))
    noise = torch.randn(GROUPS, 8, generator=generator, dtype=torch.float64)
    weights = loss_weights(sampler.table, ObjectiveConfig()).tolist()
    trained = dict(policy.named_parameters())
    gradients = None if buffers is None else RowGradients(trained, GROUPS * SIZE, buffers)  # type: ignore[arg-type]
    stream = StreamingBackward(trained, weights, gradients, positions=positions)
    rollout = sampler.rollout(
        policy.velocity, conditioning, noise, seed=0, iteration=0, group_ids=torch.arange(GROUPS), observer=stream
    )
    advantage = torch.randn(GROUPS * SIZE, generator=generator, dtype=torch.float64)
    valid = torch.ones(GROUPS * SIZE, dtype=torch.bool)
    valid[4] = False
    return SimpleNamespace(
        policy=policy, sampler=sampler, conditioning=conditioning, rollout=rollout, advantage=advantage, valid=valid,
        stream=stream,
    )  # fmt: skip


def gradient(setting: SimpleNamespace, rollout: Rollout, learner: Learner, **options: Any) -> tuple[dict, Tensor]:
    numbers = learner.update(
        setting.sampler, rollout, setting.conditioning, setting.advantage, setting.valid, **options
    )
    return numbers, torch.cat([p.grad.flatten() for p in learner.policy.parameters()])  # type: ignore[union-attr]


def assert_close(found: Tensor, expected: Tensor, summands: Tensor | None = None) -> None:
    """Float64 sums of a dozen terms in another order: a few units of 2^-53 of the largest summand."""
    assert float(expected.norm()) > 1e-6
    largest = float((expected if summands is None else summands).norm())
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12 * largest)
