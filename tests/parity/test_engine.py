"""Exact levers give the exact gradient, and the passes they spend are those that the cost model counts."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from geoalign.config.flow import FlowConfig, ObjectiveConfig
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.config.training import OptimConfig
from geoalign.errors import ConfigError
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.perf.budget import Plan, Walk, count_passes
from geoalign.rewards.registry import build_rewards
from geoalign.rl.policy import RetakePolicy
from geoalign.training.bundle import new_policy
from geoalign.training.engine import Engine, place_groups
from geoalign.training.learner import Learner
from geoalign.training.optim import MovingAverage
from geoalign.training.streaming import StreamingBackward
from geoalign.training.trainer import Trainer
from geoalign.types import RetakeBatch
from geoalign.world.pairs import paired_videos

GROUPS, SIZE = 2, 6


class Shift:
    """Conditions of the toy policy: one vector each."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def repeat_interleave(self, count: int) -> Shift:
        return Shift(self.value.repeat_interleave(count, 0))

    def select(self, index: Tensor) -> Shift:
        return Shift(self.value[index])


class Toy(nn.Module):
    """A float64 velocity with a part that, like the camera gains, enters through ``prepare``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64) / 3)
        self.gain = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def prepare(self, conditioning: Shift) -> Shift:
        return Shift(torch.tanh(conditioning.value * self.gain))

    def velocity(self, x: Tensor, timestep: Tensor, prepared: Shift) -> Tensor:
        return torch.tanh(x @ self.inner + prepared.value + timestep[:, None] / 1000) - 0.3 * x


def learner_of(policy: Toy, **changes: Any) -> Learner:
    trained = dict(policy.named_parameters())
    return Learner(
        policy,  # type: ignore[arg-type]
        trained,
        torch.optim.SGD(trained.values(), lr=0.0),
        MovingAverage(trained, 0.0),
        ObjectiveConfig(clip=1e-4),
        OptimConfig(grad_clip=1e9),
        **changes,
    )


@pytest.fixture
def setting() -> SimpleNamespace:
    policy, generator = Toy(), torch.Generator().manual_seed(1)
    sampler = FlowSampler(build_step_table(FlowConfig(steps=8), StepWindow(2, 5)), SIZE, window_grad=True)
    conditioning = Shift(torch.randn(GROUPS, 8, generator=generator, dtype=torch.float64))
    noise = torch.randn(GROUPS, 8, generator=generator, dtype=torch.float64)
    stream = StreamingBackward()
    rollout = sampler.rollout(
        policy.velocity, policy.prepare(conditioning), noise, seed=0, iteration=0, group_ids=torch.arange(GROUPS),
        observer=stream,
    )  # fmt: skip
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
    return numbers, torch.cat([p.grad.flatten() for p in setting.policy.parameters()])  # type: ignore[union-attr]


def test_merged_first_step_equals_the_plain_gradient_with_clipped_members(setting: SimpleNamespace) -> None:
    # Ratios far beyond the clip range in both directions, so that about half of the members are clipped.
    spread = torch.linspace(-0.01, 0.01, GROUPS * SIZE, dtype=torch.float64)[:, None]
    moved = replace(setting.rollout, log_prob=setting.rollout.log_prob + spread)
    plain_numbers, plain = gradient(setting, moved, learner_of(setting.policy, merge_first=False))
    numbers, merged = gradient(setting, moved, learner_of(setting.policy))
    assert numbers["policy/clip_fraction_high"] > 0.1 and numbers["policy/clip_fraction_low"] > 0.1
    # Float64 sums of 12 terms in another order.
    assert torch.allclose(merged, plain, rtol=1e-12, atol=1e-12 * float(plain.norm()))
    assert numbers["policy/loss"] == pytest.approx(plain_numbers["policy/loss"], rel=1e-12)


def test_streamed_gradient_equals_the_replayed_one(setting: SimpleNamespace) -> None:
    learner = learner_of(setting.policy)
    _, replayed = gradient(setting, setting.rollout, learner)
    assert learner.passes["replay"] == GROUPS + 2 * GROUPS * SIZE
    numbers, streamed = gradient(setting, setting.rollout, learner, stream=setting.stream)
    assert learner.passes["replay"] == 0 and learner.passes["backward"] == GROUPS + 2 * GROUPS * SIZE
    assert float(replayed.norm()) > 1e-6
    assert torch.allclose(streamed, replayed, rtol=1e-12, atol=1e-12 * float(replayed.norm()))
    assert numbers["policy/ratio_min"] == numbers["policy/ratio_max"] == 1.0


class Conditions:
    """Conditions without files: a pure function of (iteration, group id)."""

    def __init__(self, config: Config) -> None:
        assert config.world is not None
        self.world = config.world

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        pairs = paired_videos(self.world, 4, torch.Generator().manual_seed(1000 + iteration), style="real")
        return pairs.batch.select(group_ids)


def trainer_of(config: Config, engine: Engine | None = None) -> Trainer:
    policy: RetakePolicy = new_policy(config.model, config.codec, seed=3)
    with torch.no_grad():  # a policy that reacts to everything
        for parameter in policy.model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Trainer(config, policy, Conditions(config), build_rewards(config.rewards), engine)


def smoke(**changes: dict[str, Any]) -> Config:
    config = load_config(Config, "smoke")
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return Config.model_validate(config.model_copy(update=sections).model_dump())


LEVERS = [
    {"share_prefix": False, "merge_first_step": False},
    {"merge_first_step": False},
    {},
    {"streaming": True},
    {"recompute": True},
    {"prune_source": False},
    {"streaming": True, "recompute": True},
]
WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}


@pytest.mark.parametrize("levers", LEVERS, ids=lambda levers: "+".join(levers) or "default")
def test_levers_spend_the_predicted_passes_and_change_nothing_else(levers: dict[str, bool]) -> None:
    config = smoke(levers=levers, window=WINDOW)
    metrics = trainer_of(config).step()
    assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
    reference = trainer_of(smoke(window=WINDOW)).step()
    assert metrics["parity/log_prob_diff_max"] <= 1e-6
    # Batch shapes differ between levers, so float32 rounding over 6 steps of the network differs.
    assert metrics["policy/grad_norm"] == pytest.approx(reference["policy/grad_norm"], rel=2e-2)


def test_forwards_of_a_known_setting() -> None:
    """T = 12, window of 4 at step 3, 12 samples: 144 forwards become 100."""
    plain, shared = (count_passes(Walk(3, 4, 5), 1, 12, 1, Plan(share_prefix=flag)) for flag in (False, True))
    assert (plain.rollout, shared.rollout) == (144, 100)


@pytest.mark.parametrize("updates", [2, 4])
def test_an_update_replays_its_own_rows_only(updates: int) -> None:
    metrics = trainer_of(smoke(optim={"updates_per_rollout": updates}, window=WINDOW)).step()
    assert metrics["perf/forwards_learner"] == 2 * updates + 8  # merged step per condition and update; each row once
    assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/log_ratio_abs_max"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"levers": {"streaming": True}, "optim": {"updates_per_rollout": 2}},
        {"levers": {"share_prefix": False}},
        {"levers": {"streaming": True}, "objective": {"kl_weight": 0.1}},
    ],
)
def test_levers_that_would_not_be_exact_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ConfigError), match="levers"):
        smoke(**changes)


class FakeRank(Engine):
    """One of several ranks that live in threads of this process; collectives meet at a barrier."""

    def __init__(self, rank: int, world: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self.board, self.barrier = rank, world, board, barrier

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
        self.board[self.rank] = tensor.clone()
        self.barrier.wait()
        stacked = torch.stack(self.board)
        self.barrier.wait()
        return stacked.sum(0) if operation == "sum" else getattr(stacked, f"a{operation}")(0)


def run_ranks(config: Config, world: int) -> list[tuple[dict[str, float], Tensor]]:
    board, barrier = [None] * world, threading.Barrier(world, timeout=60)
    results: list[Any] = [None] * world
    trainers = [trainer_of(config, FakeRank(rank, world, board, barrier)) for rank in range(world)]

    def work(rank: int) -> None:
        try:
            metrics = trainers[rank].step()
            gradient = torch.cat([p.grad.flatten() for p in trainers[rank].learner.trained.values()])
            results[rank] = metrics, gradient
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_give_one_result(world: int) -> None:
    """2 groups of 4: whole on 2 ranks, split over 4."""
    config = smoke(window=WINDOW)
    trainer = trainer_of(config)
    expected = trainer.step()
    gradient = torch.cat([p.grad.flatten() for p in trainer.learner.trained.values()])  # type: ignore[union-attr]
    ranks = run_ranks(config, world)
    for metrics, mine in ranks:
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
        assert torch.equal(mine, ranks[0][1])  # replicas stay equal bit for bit
        # Other batch shapes round differently (float32); the scorer and the advantages see that as noise.
        assert float((mine - gradient).norm() / gradient.norm()) < 2e-2
        for name in ("reward/trans", "reward/rot", "policy/grad_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-3)


def test_placement_covers_every_row_once() -> None:
    for conditions, size, world in ((8, 12, 2), (8, 12, 8), (2, 12, 8), (1, 12, 4)):
        rows = torch.cat([place_groups(conditions, size, rank, world).rows for rank in range(world)])
        assert torch.equal(rows.sort().values, torch.arange(conditions * size))
    with pytest.raises(ConfigError, match="do not divide"):
        place_groups(3, 12, 0, 2)


@pytest.mark.parametrize("levers", [{}, {"recompute": True}], ids=["kept", "recomputed"])
def test_ratio_is_one_bitwise_in_bfloat16(levers: dict[str, bool]) -> None:
    """Matrices in bf16, residual stream and latents in float32: still the same bits in rollout and learner."""
    trainer = trainer_of(smoke(levers=levers, window=WINDOW))
    trainer.policy.model.bfloat16()
    trainer.policy.model.camera_embedding.float()  # reads ground-plane coordinates in metres
    metrics = trainer.step()
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/grad_norm"] > 0
