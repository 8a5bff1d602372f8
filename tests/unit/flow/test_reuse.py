"""Reused steps: chosen as a search over all choices chooses, and served by what the last evaluated step left."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from conditions import Cond
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.training import OdeConfig
from geoalign.errors import UsageError
from geoalign.flow.policy import PhasedPolicy, Velocity
from geoalign.flow.reuse import DriftMeter, DriftProfile, Reuse, reused_steps
from geoalign.flow.rollout import ForwardCount
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import StepTable, StepWindow, build_step_table

GROUP, SHAPE = 3, (2, 4)
GROUP_IDS = torch.tensor([4, 9])


def velocity(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return torch.tanh(1.3 * x + cond.z.view(-1, 1, 1)) + (timestep / 1000).view(-1, 1, 1)


def table(steps: int = 12, **fields: Any) -> StepTable:
    return build_step_table(FlowConfig(steps=steps, shift=4.0, **fields), StepWindow(1, 3))


def roll(sampler: FlowSampler, policy: Any) -> Any:
    noise = initial_noise(SHAPE, 1, 2, GROUP_IDS)
    return sampler.rollout(policy, Cond(torch.tensor([0.3, -0.7])), noise, seed=1, iteration=2, group_ids=GROUP_IDS)


PHASES = PhasedPolicy(velocity, velocity, Reuse.of_velocity(velocity))


@given(
    drift=st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8),
    count=st.integers(1, 9),
    fields=st.sampled_from([{}, {"tail_grid": "sigma"}, {"tail_steps": 5}]),
)
def test_no_other_choice_of_as_many_steps_has_less_error(
    drift: list[float], count: int, fields: dict[str, Any]
) -> None:
    """Against every subset; drift by numpy's interpolation inside the measured range, which covers the tail."""
    steps = table(**fields)
    levels = steps.sigmas.numpy()
    measured = np.linspace(levels[3], levels[-2], 8)
    rising = np.cumsum(drift)
    profile = DriftProfile(measured.tolist(), rising.tolist())
    tail = range(3, steps.num_steps)
    along = {k: float(np.interp(-levels[k], -measured, rising)) for k in tail}

    def error(evaluated: tuple[int, ...]) -> float:
        last, total = tail[0], 0.0
        for k in tail:
            last = k if k in evaluated else last
            total += (levels[k] - levels[k + 1]) * (along[k] - along[last])
        return total

    reused = reused_steps(steps, profile, count)
    chosen = tuple(k for k in tail if k not in reused)
    assert len(chosen) == min(count, len(tail)) and chosen[0] == 3
    others = [error((3, *rest)) for rest in combinations(tail[1:], len(chosen) - 1)]
    # Sums of at most nine products of numbers up to 8 in float64.
    assert error(chosen) <= min(others) + 1e-12


def test_a_profile_goes_on_beyond_what_was_measured() -> None:
    profile = DriftProfile((0.8, 0.6, 0.4), (0.0, 0.1, 0.5))
    assert [profile.at(s) for s in (0.9, 0.8, 0.7, 0.5, 0.2)] == pytest.approx([-0.05, 0.0, 0.05, 0.3, 0.9], abs=1e-12)
    for sigmas, drift in (((0.5,), (0.0,)), ((0.5, 0.6), (0.0, 1.0)), ((0.6, 0.5), (1.0, 0.0)), ((0.6, 0.5), (0.0,))):
        with pytest.raises(UsageError, match="drift profile"):
            DriftProfile(sigmas, drift)


def test_reused_steps_take_the_last_velocity_and_are_counted_apart() -> None:
    """The tail walked again by hand, from the states after the window."""
    steps = table()
    reused = frozenset({4, 5, 7, 10, 11})
    run = roll(FlowSampler(steps, GROUP, reused=reused, rows_per_forward=2), PHASES)
    exact = roll(FlowSampler(steps, GROUP), velocity)
    assert torch.equal(run.log_prob, exact.log_prob) and torch.equal(run.x_next, exact.x_next)
    x, last = run.x_next[-1].double(), torch.empty(0)
    cond = Cond(torch.tensor([0.3, -0.7]).repeat_interleave(GROUP).double())
    levels = steps.sigmas.tolist()
    for k in range(3, 12):
        if k not in reused:
            last = velocity(x, torch.full((6,), 1000 * levels[k]).double(), cond)
        x = x + (levels[k + 1] - levels[k]) * last
    # Nine steps of numbers of order 1 in float32, each of slope below 3.
    torch.testing.assert_close(run.final.double(), x, rtol=0, atol=1e-5)
    assert run.forwards == ForwardCount(prefix=2, window=2 + 6, tail=6 * 4, reused=6 * 5)
    assert run.forwards.total == 34


@pytest.mark.parametrize("fields", [{}, {"tail_solver": "dpm2m"}, {"tail_grid": "sigma", "tail_steps": 4}])
@pytest.mark.parametrize("reused", [frozenset(), frozenset({4, 6})])
def test_a_stored_state_finishes_as_its_rollout_did(fields: dict[str, Any], reused: frozenset[int]) -> None:
    sampler = FlowSampler(table(**fields), GROUP, reused=reused, rows_per_forward=2)
    run = roll(sampler, PHASES)
    before = run.state(1)
    cond = Cond(torch.tensor([0.3, -0.7]))
    with torch.no_grad():
        last = velocity(before, torch.full((6,), 1000 * float(sampler.table.sigmas[2])), cond.repeat_interleave(GROUP))
    history = before - float(sampler.table.sigmas[2]) * last
    final, spent = sampler.finish(PHASES, cond, run.x_next[-1], history)
    assert torch.equal(final, run.final)
    assert (spent.tail, spent.reused) == (run.forwards.tail, run.forwards.reused)
    if "tail_solver" in fields:
        with pytest.raises(UsageError, match="m_prev"):
            sampler.finish(PHASES, cond, run.x_next[-1])
    if reused:
        with pytest.raises(UsageError, match="leaves nothing behind"):
            sampler.finish(velocity, cond, run.x_next[-1], history)


def test_the_drift_is_that_of_velocities_one_step_old_and_changes_no_bit() -> None:
    steps = table()
    meter = DriftMeter(steps)
    run = roll(FlowSampler(steps, GROUP, drift=meter, rows_per_forward=2), PHASES)
    assert torch.equal(run.final, roll(FlowSampler(steps, GROUP), velocity).final)
    profile = meter.profile()
    assert profile is not None and list(profile.sigmas) == steps.sigmas[3:12].tolist()
    cond, x, old, squares = Cond(torch.tensor([0.3, -0.7]).repeat_interleave(GROUP)), run.x_next[-1], None, []
    for k in range(3, 12):
        new = velocity(x, torch.full((6,), 1000 * float(steps.sigmas[k])), cond)
        if old is not None:
            squares.append(float((new - old).square().mean()))
        x, old = x + float(steps.sigmas[k + 1] - steps.sigmas[k]) * new, new
    # float32 velocities of order 1 against drifts of order 0.01 to 0.1.
    np.testing.assert_allclose(profile.drift, [0.0, *np.cumsum(np.sqrt(squares))], rtol=1e-4)
    assert [profile.reaches(build_step_table(FlowConfig(steps=12, shift=4.0), StepWindow(start, start + 2)))
            for start in range(4)] == [False, True, True, True]  # fmt: skip
    meter.sums.zero_()
    assert meter.profile() is None


def test_a_failed_sample_does_not_hide_the_drift_of_the_others() -> None:
    meter = DriftMeter(table())
    new = torch.ones(3, 2)
    new[1] = float("nan")
    meter.add(4, Velocity(torch.zeros(3, 2)), Velocity(new))
    profile = meter.profile()
    assert profile is not None and profile.drift == [0.0, 1.0]


def test_the_share_is_rounded_up() -> None:
    counts = [OdeConfig(reuse="residual", reuse_share=0.3).evaluated(n) for n in (1, 3, 10, 11, 20)]
    assert counts == [1, 1, 3, 4, 6]
    assert OdeConfig(reuse_share=0.3).evaluated(10) == 10
