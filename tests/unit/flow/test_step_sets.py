"""Any set of stochastic steps on any grid: replay, sharing, counts; densities against published formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conditions import Cond
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.distributions import Normal

from geoalign.config.flow import FlowConfig, ObjectiveConfig
from geoalign.errors import ConfigError
from geoalign.flow.policy import Velocity
from geoalign.flow.rollout import ForwardCount, Rollout
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import StepSet, StepTable, StepWindow, build_step_table
from geoalign.rl.objective import loss_weights
from geoalign_kernels import NoiseKey, philox_normal

STEPS, GROUP, SHAPE = 10, 3, (4, 5)
IDS = torch.tensor([5, 90])
SETS = [(2, 5, 6, 8), (0, 4), (7,), (1, 2, 3), (0, 9)]


COND = Cond(torch.tensor([0.4, -0.9]))


def field(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """A velocity whose result per sample cannot depend on the batch."""
    wide = (-1, *[1] * (x.dim() - 1))
    return torch.tanh(1.2 * x + cond.z.to(x).view(wide)) + (timestep / 1000).view(wide)


def guided(x: Tensor, timestep: Tensor, cond: Cond) -> Velocity:
    return Velocity(field(x, timestep, cond), field(x, timestep, Cond(0 * cond.z)), 4.5)


def unipc() -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def euler(dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    scheduler.set_timesteps(STEPS, mu=0.9 if dynamic else None)
    return scheduler


GRIDS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "unipc": lambda: (unipc().sigmas, unipc().timesteps),
    "euler": lambda: (euler(False).sigmas, euler(False).timesteps),
    "dynamic": lambda: (euler(True).sigmas, euler(True).timesteps),
    "list": lambda: (torch.linspace(1, 0, STEPS + 1) ** 2, torch.arange(STEPS, 0, -1) * 100),
}


def table(grid: str = "euler", stochastic: tuple[int, ...] = (2, 5, 6, 8), **fields: object) -> StepTable:
    return StepTable.from_sigmas(*GRIDS[grid](), stochastic=stochastic, **fields)  # type: ignore[arg-type]


def roll(sampler: FlowSampler, policy: Callable = field, dtype: torch.dtype = torch.float32) -> Rollout:
    x_init = initial_noise(SHAPE, 3, 1, IDS).to(dtype)
    return sampler.rollout(policy, COND, x_init, seed=3, iteration=1, group_ids=IDS)


def test_consecutive_steps_are_the_window_and_give_its_very_table() -> None:
    assert StepSet.of({4, 2, 3}) == StepWindow(2, 5) and StepSet.of([]) is None
    config = FlowConfig(steps=STEPS, shift=3.0)
    ours = build_step_table(config, StepWindow(2, 5))
    same = StepTable.from_sigmas(ours.sigmas, ours.timesteps, eta=config.eta, stochastic=range(2, 5))
    assert torch.equal(same.coefficients, ours.coefficients) and torch.equal(same.timesteps, ours.timesteps)
    assert same.kind == ours.kind and same.window == ours.window
    first, second = roll(FlowSampler(ours, GROUP)), roll(FlowSampler(same, GROUP))
    assert torch.equal(first.final, second.final) and torch.equal(first.log_prob, second.log_prob)
    assert not first.entered


@pytest.mark.parametrize("stochastic", SETS)
@pytest.mark.parametrize("policy", [field, guided])
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_sharing_and_splitting_change_no_bit_and_replay_equals_rollout(
    stochastic: tuple[int, ...], policy: Callable, rows: int | None
) -> None:
    steps = table(stochastic=stochastic)
    sampler = FlowSampler(steps, GROUP, rows_per_forward=rows)
    run, apart = roll(sampler, policy), roll(FlowSampler(steps, GROUP, share_prefix=False), policy)
    assert torch.equal(run.final, apart.final) and torch.equal(run.log_prob, apart.log_prob)
    for position in range(len(stochastic)):
        for batch in sampler.replay_batches(run, position):
            again = sampler.replay(policy, run, position, COND, batch).log_prob
            assert torch.equal(again, run.log_prob[batch, position])
    first, size = stochastic[0], len(stochastic)
    passes = 2 if policy is guided else 1
    expected = (first, 1 + GROUP * (size - 1), GROUP * (STEPS - first - size))
    assert run.forwards == ForwardCount(*(passes * len(IDS) * count for count in expected))
    assert apart.forwards.total == passes * len(IDS) * GROUP * STEPS


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "linear"])
def test_a_foreign_grid_is_taken_as_it_is_and_replays_bitwise(grid: str, sde: str) -> None:
    sigmas, timesteps = GRIDS[grid]()
    steps = table(grid, sde=sde)
    assert steps.sigmas.tolist() == sigmas.double().tolist()
    assert steps.timesteps.tolist() == timesteps.double().tolist()
    sampler = FlowSampler(steps, GROUP)
    run = roll(sampler)
    for position in range(4):
        assert torch.equal(sampler.replay(field, run, position, COND).log_prob, run.log_prob[:, position])


def published_step(sde: str, eta: float, sigmas: list[float], k: int, x: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of flow_grpo's step, in float64: the drift of its SDE, its two noise levels."""
    sigma, after = sigmas[k], sigmas[k + 1]
    if sde == "linear":
        level = sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigma
    else:
        level = eta * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
    dt = after - sigma
    mean = x * (1 + level**2 / (2 * sigma) * dt) + v * (1 + level**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, level * math.sqrt(-dt)


@pytest.mark.parametrize("grid", ["unipc", "euler", "dynamic", "list"])
@pytest.mark.parametrize(("sde", "eta"), [("flow", 0.7), ("linear", 1.0)])
def test_walk_and_densities_equal_the_published_formulas_in_float64(grid: str, sde: str, eta: float) -> None:
    """Every sample by itself, as flow_grpo runs it, with the same noises; step 0 of UniPC: see the next test."""
    stochastic = (1, 4, 5, 8) if grid == "unipc" else (0, 4, 5, 9)
    steps = table(grid, stochastic, sde=sde, eta=eta)
    run = roll(FlowSampler(steps, GROUP), dtype=torch.float64)
    sigmas = [float(value) for value in GRIDS[grid]()[0]]
    for row in range(run.num_rows):
        group = IDS[row // GROUP : row // GROUP + 1]
        cond = Cond(COND.z[row // GROUP : row // GROUP + 1])
        x = initial_noise(SHAPE, 3, 1, group).double()
        for k in range(STEPS):
            v = field(x, GRIDS[grid]()[1][k : k + 1].double(), cond)
            if k not in stochastic:
                x = x + (sigmas[k + 1] - sigmas[k]) * v
                continue
            mean, std = published_step(sde, eta, sigmas, k, x, v)
            x = mean + std * philox_normal(SHAPE, NoiseKey(3, 1, group, torch.tensor([row % GROUP]), k, 0)).double()
            density = Normal(mean, std).log_prob(x).mean()
            got = run.log_prob[row, stochastic.index(k)]
            torch.testing.assert_close(got, density, rtol=0, atol=1e-12 * max(1.0, 1 / std**2))
        torch.testing.assert_close(run.final[row], x[0], rtol=0, atol=1e-12)


def test_a_first_level_that_means_one_is_taken_for_one() -> None:
    """UniPC writes 1 - 1e-6; taken literally, the noise of Flow-SDE would have a level of 700 there."""
    sigmas, timesteps = GRIDS["unipc"]()
    assert 0 < 1 - float(sigmas[0]) < 2e-6
    near = StepTable.from_sigmas(sigmas, timesteps, stochastic={0})
    exact = StepTable.from_sigmas([1.0, *sigmas[1:].tolist()], timesteps, stochastic={0})
    # A first step shorter by 1e-6 of its 0.036.
    torch.testing.assert_close(near.coefficients, exact.coefficients, rtol=3e-5, atol=0)
    weight = loss_weights(near, ObjectiveConfig(loss_weight="longcat"))
    torch.testing.assert_close(weight, loss_weights(exact, ObjectiveConfig(loss_weight="longcat")), rtol=3e-5, atol=0)


def test_weights_of_a_set_are_those_of_its_steps() -> None:
    config = ObjectiveConfig(loss_weight="guard")
    every = loss_weights(table(stochastic=tuple(range(STEPS))), config)
    assert torch.equal(loss_weights(table(), config), every[[2, 5, 6, 8]])


def test_a_broken_row_of_a_set_is_neutralised_everywhere() -> None:
    def broken(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        v = field(x, timestep, cond)
        return v.index_fill(0, torch.tensor([4]), float("nan")) if len(x) == 6 and timestep[0] < 800 else v

    run = roll(FlowSampler(table(stochastic=(1, 8)), GROUP), broken)
    cleaned, finite = run.neutralised()
    assert finite.tolist() == [True] * 4 + [False, True]
    assert bool(torch.isfinite(cleaned.state(1)).all()) and float(cleaned.state(1)[4].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": [1.0, 0.5]}, "append 0"),
        ({"sigmas": [1.0, 0.5, 0.5, 0.0]}, "must fall"),
        ({"sigmas": [1.1, 0.5, 0.0]}, "at most 1"),
        ({"timesteps": [900.0]}, "make 2 steps, but there are 1"),
        ({"stochastic": {2}}, "step 2 lies beyond"),
        ({"stochastic": {-1, 1}}, "from 0"),
        ({"stochastic": {1}, "sde": "cps"}, r"steps \[1\] add no noise"),
    ],
)
def test_grids_and_sets_that_cannot_be_walked_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepTable.from_sigmas(**{"sigmas": [1.0, 0.5, 0.0], "timesteps": [1000.0, 500.0], **changes})
