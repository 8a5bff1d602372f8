"""Shape, bounds and step counts of the step table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from geoalign.config.flow import FlowConfig
from geoalign.errors import ConfigError
from geoalign.flow.table import StepWindow, build_step_table

FLASH = {"tail_solver": "dpm2m"}


def nfe(ratio: float, start: int, size: int = 4, steps: int = 25) -> int:
    config = FlowConfig(steps=steps, shift=5.0, tail_ratio=ratio, tail_solver="dpm2m")
    return build_step_table(config, StepWindow(start, start + size)).num_steps


def test_network_evaluations_of_the_flash_tail() -> None:
    """Counts of MixGRPO-Flash for T = 25, window 4: floor((T - last) r) nodes after the last window step."""
    assert [nfe(0.4, start) for start in range(12)] == [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18]
    assert nfe(0.2, 0) == 7
    assert [nfe(1.0, start) for start in (0, 5, 20)] == [25, 25, 25]


@given(
    steps=st.integers(3, 40),
    ratio=st.floats(0.01, 1.0),
    shift=st.floats(0.5, 12.0),
    data=st.data(),
)
def test_every_table_ends_at_zero_with_a_deterministic_step(steps: int, ratio: float, shift: float, data) -> None:  # type: ignore[no-untyped-def]
    start = data.draw(st.integers(0, steps - 2))
    stop = data.draw(st.integers(start + 1, steps - 1))
    length = data.draw(st.sampled_from([{"tail_ratio": ratio}, {"tail_steps": 1 + int(ratio * steps)}]))
    grid = data.draw(st.sampled_from(["schedule", "sigma"]))
    config = FlowConfig(steps=steps, shift=shift, tail_solver="dpm2m", tail_grid=grid, **length)
    table = build_step_table(config, StepWindow(start, stop))
    full = build_step_table(config)
    assert table.sigmas[0] == 1.0 and table.sigmas[-1] == 0.0
    assert bool((table.sigmas.diff() < 0).all())
    assert torch.equal(table.sigmas[: stop + 1], full.sigmas[: stop + 1])
    assert table.kind == tuple("sde" if start <= k < stop else "ode" for k in range(table.num_steps))
    assert stop + 1 <= table.num_steps <= steps
    assert bool((table.coefficients[:, 2] != 0).eq(torch.tensor([kind == "sde" for kind in table.kind])).all())
    assert bool(torch.isfinite(table.coefficients).all())
    assert table.coefficients.dtype == table.sigmas.dtype == table.timesteps.dtype == torch.float64


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_a_sigma_tail_takes_equal_steps_of_sigma(solver: str) -> None:
    """Nodes by numpy, and Euler's coefficients from them; second order reproduces a velocity linear in sigma better."""
    config = FlowConfig(steps=25, shift=5.0, tail_grid="sigma", tail_steps=7, tail_solver=solver)
    table = build_step_table(config, StepWindow(2, 6))
    assert table.num_steps == 13
    nodes = np.linspace(float(table.sigmas[6]), 0.0, 8)
    # One product and one quotient in float64, of numbers below 1.
    np.testing.assert_allclose(table.sigmas[6:].numpy(), nodes, rtol=0, atol=1e-15)
    np.testing.assert_allclose(table.timesteps[6:].numpy(), (1000 * nodes[:-1]).astype(np.float32), rtol=0, atol=0)
    if solver == "euler":
        np.testing.assert_allclose(table.coefficients[6:, 1].numpy(), np.diff(nodes), rtol=0, atol=1e-15)
        return
    assert [table.needs_history(step) for step in range(13)] == [False] * 6 + [True] * 6 + [False]


def test_a_tail_is_never_longer_than_the_time_grid() -> None:
    long = FlowConfig(steps=25, shift=5.0, tail_grid="sigma", tail_steps=9)
    assert [build_step_table(long, StepWindow(s, s + 4)).num_steps - s - 4 for s in (2, 12, 19)] == [9, 9, 2]
    with pytest.raises(ValidationError, match="tail_steps 9 and tail_ratio"):
        FlowConfig(tail_steps=9, tail_ratio=0.5)


def test_a_full_tail_is_the_full_grid() -> None:
    config = FlowConfig(steps=25, shift=5.0)
    assert torch.equal(build_step_table(config, StepWindow(3, 7)).sigmas, build_step_table(config).sigmas)


def test_history_is_read_in_second_order_tails_only() -> None:
    table = build_step_table(FlowConfig(steps=12, shift=3.0, **FLASH), StepWindow(2, 5))
    assert [table.needs_history(k) for k in range(12)] == [False] * 5 + [True] * 6 + [False]
    assert not table.needs_history(12) and not table.needs_history(-1)
    # Rows with history still reproduce a constant: a + d = 1 when m = m_prev = x (v = 0).
    torch.testing.assert_close(
        table.coefficients[:, 0] + table.coefficients[:, 3],
        torch.where(table.coefficients[:, 2] != 0, table.coefficients[:, 0], 1.0),
        rtol=0,
        atol=1e-14,
    )


def test_eta_by_step_overrides_the_first_steps() -> None:
    listed = build_step_table(
        FlowConfig(steps=6, shift=3.0, sde="cps", eta=0.5, eta_by_step=(1, 1, 0.8)), StepWindow(0, 5)
    )
    for step, eta in enumerate((1.0, 1.0, 0.8, 0.5, 0.5)):
        single = build_step_table(FlowConfig(steps=6, shift=3.0, sde="cps", eta=eta), StepWindow(0, 5))
        assert torch.equal(listed.row(step), single.row(step))


def test_timesteps_are_rounded_as_the_network_sees_them() -> None:
    exact = build_step_table(FlowConfig(steps=25, shift=5.0))
    rounded = build_step_table(FlowConfig(steps=25, shift=5.0, t_dtype="bfloat16"))
    assert torch.equal(exact.timesteps, (1000 * exact.sigmas[:-1]).float().double())
    assert torch.equal(rounded.timesteps, rounded.timesteps.bfloat16().double())
    assert float((rounded.timesteps - exact.timesteps).abs().max()) > 0.5
    assert torch.equal(rounded.coefficients, exact.coefficients)


@pytest.mark.parametrize("window", [(24, 25), (0, 25), (20, 30)])
def test_the_last_step_cannot_be_stochastic(window: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="must be deterministic"):
        build_step_table(FlowConfig(steps=25), StepWindow(*window))


@pytest.mark.parametrize("window", [(3, 3), (4, 2), (-1, 2)])
def test_empty_windows_are_refused(window: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="empty or negative"):
        StepWindow(*window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sde": "cps", "eta": 1.2}, "cps needs eta"),
        ({"sde": "cps", "eta": 0.5, "eta_by_step": (2.0,)}, "cps needs eta"),
        ({"eta_by_step": (0.5, 0.0)}, "positive"),
        ({"steps": 3, "eta_by_step": (0.5,) * 4}, "4 entries for 3 steps"),
    ],
)
def test_impossible_flow_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FlowConfig(**fields)
