"""The coefficient table against derivations that share no code with it: score forms, Gaussians, diffusers' solvers."""

from __future__ import annotations

import math
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
import torch

from geoalign.config.flow import FlowConfig, OdeSolver
from geoalign.flow.table import StepTable, StepWindow, build_step_table

STEPS, SHIFT = 25, 5.0
# Float64 throughout; numbers of order 1 to 120 pass through about ten roundings.
RTOL = 1e-13


def table(start: int = 0, stop: int = STEPS - 1, **fields: object) -> StepTable:
    return build_step_table(FlowConfig(steps=STEPS, shift=SHIFT, **fields), StepWindow(start, stop))


def grid(steps: int = STEPS, shift: float = SHIFT) -> np.ndarray:
    u = np.linspace(1.0, 0.0, steps + 1)
    return 1.0 / (1.0 + (1.0 / u[:-1] - 1.0) / shift)  # sigma / (1 - sigma) = shift * u / (1 - u); the last node is 0


def noise_std(variant: str, eta: float, sigma: float, after: float) -> float:
    """Standard deviation per unit of sqrt(step), from each paper's own statement."""
    delta = sigma - after
    reference = after if sigma == 1.0 else sigma
    snr_level = eta * math.sqrt(sigma / (1.0 - reference))
    if variant == "dance":
        return eta
    if variant == "linear":
        return eta * grid()[1] * sigma
    if variant == "longcat_truncated":
        return min(snr_level * math.sqrt(delta), 0.45) / math.sqrt(delta)
    return snr_level


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("variant", ["flow", "dance", "longcat_truncated", "cps", "linear"])
def test_stochastic_rows_equal_the_score_form(variant: str, eta: float) -> None:
    """Apply the rows to random (x, v, eps) and compare with the step written in x0, n and score."""
    rows = table(sde=variant, eta=eta).coefficients.numpy()
    sigmas = np.append(grid(), 0.0)
    x, v, eps = np.random.default_rng(0).standard_normal((3, 7))
    for k in range(STEPS - 1):
        sigma, after = sigmas[k], sigmas[k + 1]
        clean, noise = x - sigma * v, x + (1.0 - sigma) * v
        if variant == "cps":
            fresh = after * math.sin(eta * math.pi / 2)
            kept = math.sqrt(max(after**2 - fresh**2, 0.0))
            expected = (1.0 - after) * clean + kept * noise + fresh * eps
        else:
            level = noise_std(variant, eta, sigma, after)
            score = -noise / sigma
            delta = sigma - after
            expected = x - delta * (v - 0.5 * level**2 * score) + level * math.sqrt(delta) * eps
        a, b, c, d = rows[k]
        # cps at eta 1: kept is 0 by cos, but sqrt(eps) * after = 1e-8 by the square root here.
        atol = 3e-8 if variant == "cps" else 1e-13
        np.testing.assert_allclose(a * x + b * v + c * eps, expected, rtol=RTOL, atol=atol)
        assert d == 0.0


def test_noise_levels_equal_published_schedules() -> None:
    """Standard deviations that the formulas of Flow-GRPO, DanceGRPO and LongCat-Video give for T = 25."""
    shown = [0, 1, 2, 3, 8, 14, 23]
    std = table(sde="flow", eta=0.7).coefficients[shown, 2].tolist()
    assert [round(value, 3) for value in std] == [0.700, 0.721, 0.516, 0.427, 0.280, 0.232, 0.167]
    shift3 = build_step_table(FlowConfig(steps=25, shift=3.0, eta=0.7), StepWindow(0, 24)).coefficients
    assert [round(value, 3) for value in shift3[shown, 2].tolist()] == [0.700, 0.715, 0.509, 0.418, 0.264, 0.202, 0.111]
    dance = table(sde="dance", eta=0.3).coefficients[:24, 2]
    assert round(dance[0].item(), 3) == 0.027
    assert bool((dance.diff() > 0).all())
    capped = table(sde="longcat_truncated", eta=0.7).coefficients[:24, 2]
    assert [abs(value - 0.45) < 1e-12 for value in capped[:5].tolist()] == [True, True, True, False, False]


@pytest.mark.parametrize("variant", ["flow", "dance", "longcat_truncated", "cps", "linear"])
def test_vanishing_noise_gives_the_euler_step(variant: str) -> None:
    euler = build_step_table(FlowConfig(steps=STEPS, shift=SHIFT)).coefficients
    for eta in (1e-4, 1e-8):
        rows = table(sde=variant, eta=eta).coefficients
        # Drift differs from Euler by O(eta^2 sigma / (1 - sigma) D), at most eta^2; noise is O(eta).
        torch.testing.assert_close(rows[:, :2], euler[:, :2], rtol=0, atol=2 * eta**2 + 1e-15)
        assert float(rows[:, 2].abs().max()) <= 2 * eta


def test_coefficient_preserving_step_keeps_the_noise_level() -> None:
    sigmas = np.append(grid(), 0.0)
    rows = table(sde="cps", eta=0.8).coefficients.numpy()
    for k in range(STEPS - 1):
        a, _, c, _ = rows[k]
        kept = a - (1.0 - sigmas[k + 1])
        assert math.hypot(kept, c) == pytest.approx(sigmas[k + 1], rel=1e-12)


def test_flow_and_dance_agree_where_their_levels_agree() -> None:
    flow = table(sde="flow", eta=0.7)
    for k in (1, 5, 20):
        sigma = float(flow.sigmas[k])
        dance = table(sde="dance", eta=0.7 * math.sqrt(sigma / (1 - sigma)))
        torch.testing.assert_close(dance.row(k), flow.row(k), rtol=RTOL, atol=0)


def test_every_solver_takes_steps_of_its_own() -> None:
    """A setting that does what another does would be audited and priced as an approximation."""
    tables = [build_step_table(FlowConfig(steps=STEPS, tail_solver=solver)) for solver in get_args(OdeSolver)]
    assert not any(torch.equal(a.coefficients, b.coefficients) for a, b in combinations(tables, 2))


def walk(rows: torch.Tensor, sigmas: torch.Tensor, x: torch.Tensor, velocity) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Deterministic steps with the rows as documented."""
    m_prev = torch.zeros_like(x)
    for (a, b, _, d), sigma in zip(rows.tolist(), sigmas.tolist(), strict=False):
        v = velocity(x, sigma)
        x, m_prev = a * x + b * v + d * m_prev, x - sigma * v
    return x


def test_deterministic_solvers_equal_diffusers() -> None:
    """Euler and DPM-Solver++ 2M midpoint against diffusers' schedulers on a nonlinear velocity field."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.sin(3 * x) - 0.5 * x + sigma

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigmas = build_step_table(FlowConfig(steps=12, shift=3.0)).sigmas
    euler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    euler.set_timesteps(sigmas=sigmas[:-1].tolist())
    multistep = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, lower_order_final=False, final_sigmas_type="zero",
    )  # fmt: skip
    multistep.set_timesteps(12)
    multistep.sigmas = sigmas.clone()
    for solver, scheduler in (("euler", euler), ("dpm2m", multistep)):
        state = x.clone()
        for k, t in enumerate(scheduler.timesteps):
            state = scheduler.step(velocity(state, float(sigmas[k])), t, state).prev_sample.double()
        rows = build_step_table(FlowConfig(steps=12, shift=3.0, tail_solver=solver)).coefficients
        # diffusers keeps samples in float32: 12 steps of relative error 6e-8, amplified by the field's slope of 3.
        torch.testing.assert_close(walk(rows, sigmas, x, velocity), state, rtol=0, atol=5e-6)


def gaussian_moments(sigma: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of x_sigma for x0 ~ N(mean, std^2)."""
    return (1 - sigma) * mean, math.hypot((1 - sigma) * std, sigma)


def gaussian_velocity(x, sigma: float, mean: float, std: float):  # type: ignore[no-untyped-def]
    """E[n - x0 | x_sigma = x] for that target: linear in x by Gaussian regression."""
    centre, spread = gaussian_moments(sigma, mean, std)
    slope = (sigma - (1 - sigma) * std**2) / spread**2
    return slope * (x - centre) - mean


def marginal_error(steps: int, variant: str, eta: float) -> float:
    """Largest error of the propagated standard deviation between sigma = 0.8 and 0.1, exactly (no sampling).

    A step is affine in x for this target, so x' = p x + q + c eps has mean p E x + q and variance p^2 Var x + c^2.
    """
    mean, std = 1.5, 0.6
    start, stop = steps // 5, 9 * steps // 10
    steps_table = build_step_table(FlowConfig(steps=steps, shift=1.0, sde=variant, eta=eta), StepWindow(start, stop))
    sigmas = steps_table.sigmas.tolist()
    centre, spread = gaussian_moments(sigmas[start], mean, std)
    worst = 0.0
    for k in range(start, stop):
        a, b, c, _ = steps_table.row(k).tolist()
        q = b * gaussian_velocity(0.0, sigmas[k], mean, std)
        p = a + b * gaussian_velocity(1.0, sigmas[k], mean, std) - q
        centre, spread = p * centre + q, math.hypot(p * spread, c)
        exact_centre, exact_spread = gaussian_moments(sigmas[k + 1], mean, std)
        worst = max(worst, abs(centre - exact_centre), abs(spread - exact_spread))
    return worst


@pytest.mark.parametrize("variant", ["flow", "dance", "longcat_truncated", "cps", "linear"])
def test_stochastic_steps_preserve_marginals(variant: str) -> None:
    """First order in the step size D; CPS replaces a share of the noise per step, which must shrink as sqrt(D)."""
    share = {"cps": lambda steps: 2.0 / math.sqrt(steps)}.get(variant, lambda steps: 0.7)
    coarse, fine = (marginal_error(steps, variant, share(steps)) for steps in (400, 800))
    assert fine < 4e-3
    assert 1.8 < coarse / fine < 2.2


def test_coefficient_preserving_step_is_exact_for_a_single_video() -> None:
    """With one possible clean video the predicted noise is exact, so any eta keeps the marginal."""
    rows = table(sde="cps", eta=1.0)
    spread = 1.0
    for k in range(STEPS - 1):
        sigma = float(rows.sigmas[k])
        a, b, c, _ = rows.row(k).tolist()
        slope = a + b * (1.0 / sigma)  # v = (x - x0) / sigma
        spread = math.hypot(slope * spread, c)
        assert spread == pytest.approx(float(rows.sigmas[k + 1]), rel=1e-12)


def ode_error(solver: str, steps: int) -> float:
    """End error on the Gaussian target, whose flow maps standardised values onto each other."""
    mean, std = 1.5, 0.6
    steps_table = build_step_table(FlowConfig(steps=steps, shift=1.0, tail_solver=solver))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    end = walk(steps_table.coefficients, steps_table.sigmas, x, lambda x, sigma: gaussian_velocity(x, sigma, mean, std))
    return float((end - (mean + std * x)).abs().max())


def test_convergence_orders_of_the_solvers() -> None:
    orders = {s: math.log2(ode_error(s, 160) / ode_error(s, 320)) for s in ("euler", "dpm2m")}
    assert orders["euler"] == pytest.approx(1.0, abs=0.1)
    assert orders["dpm2m"] == pytest.approx(2.0, abs=0.2)
    assert ode_error("dpm2m", 10) < ode_error("euler", 10)
