"""Objective: time weights against value tables, the clip, the KL term, masks and shares."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from geoalign.config.flow import LONGCAT_FLATTENS, FlowConfig, ObjectiveConfig, SdeVariant
from geoalign.config.schema import Config
from geoalign.errors import UsageError
from geoalign.flow.table import StepTable, StepWindow, build_step_table
from geoalign.rl.objective import LossOutput, clipped_surrogate, kl_loss, loss_weights, reference_kl


def table(shift: float = 5.0, start: int = 0, stop: int = 24, **fields: object) -> StepTable:
    return build_step_table(FlowConfig(steps=25, shift=shift, **fields), StepWindow(start, stop))


def weights(kind: str, plan: StepTable, norm: str = "none") -> Tensor:
    return loss_weights(plan, ObjectiveConfig(loss_weight=kind, weight_norm=norm))


def test_longcat_weights_equal_the_value_tables() -> None:
    """sqrt(sigma / ((1 - sigma) D)) evaluated by hand for T = 25, to half a unit of the last digit written down."""
    by_hand = {
        5.0: "0: 121, 1: 117, 2: 78, 3: 60, 5: 41, 8: 26.5, 11: 17.8, 14: 11.9, 20: 4.3, 23: 1.8",
        3.0: "0: 73, 1: 70.5, 2: 47.5, 3: 36.8, 5: 25.6, 8: 16.9, 11: 11.7, 14: 8.2, 20: 3.4, 23: 1.65",
    }
    for shift, values in by_hand.items():
        found = weights("longcat", table(shift=shift))
        for step, digits in (each.split(": ") for each in values.split(", ")):
            half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
            assert float(found[int(step)]) == pytest.approx(float(digits), rel=0, abs=half), (shift, step)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_longcat_cancels_the_gradient_scale_of_flow_sde(eta: float) -> None:
    """|b| / c * w = (1 + eta^2 / 2) / eta for every k >= 1; 1 / eta at k = 0, where sigma_1 replaces sigma_0."""
    plan = table(eta=eta)
    _, b, c, _ = plan.coefficients[:24].unbind(1)
    scale = b.abs() / c * weights("longcat", plan)
    torch.testing.assert_close(
        scale[1:], torch.full((23,), (1 + eta**2 / 2) / eta, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert float(scale[0]) == pytest.approx(1 / eta, rel=1e-12)


@pytest.mark.parametrize("sde", get_args(SdeVariant))
def test_longcat_is_taken_with_the_samplers_that_it_evens_out_and_no_others(sde: str) -> None:
    """By the spread of |b| / c * w over the steps after the first, which sigma_1 makes an exception."""
    plan = table(sde=sde, eta=0.7, **({"noise_cap": 10.0} if sde == "longcat_truncated" else {}))  # below the cap
    _, b, c, _ = plan.coefficients[:24].unbind(1)
    scale = (b.abs() / c * weights("longcat", plan))[1:]
    spread = float(scale.max() / scale.min())
    even = spread < 1 + 1e-12
    assert even or spread > 1.3  # 1.4 for cps, 5 for linear, 11 for dance
    if even:
        Config.model_validate({"flow": {"sde": sde}})
    else:
        with pytest.raises(ValidationError, match=f"longcat does not even out the steps of flow.sde {sde}; set"):
            Config.model_validate({"flow": {"sde": sde}})
    assert (sde in LONGCAT_FLATTENS) == even


@pytest.mark.parametrize("sde", get_args(SdeVariant))
def test_exact_inverse_cancels_it_for_every_sampler(sde: str) -> None:
    plan = table(sde=sde)
    _, b, c, _ = plan.coefficients[:24].unbind(1)
    product = b.abs() / c * weights("exact_inverse", plan)
    torch.testing.assert_close(product, torch.ones(24, dtype=torch.float64), rtol=1e-12, atol=0)


def test_exact_inverse_where_the_noise_is_capped() -> None:
    """1 / (D / tau + tau (1 - sigma) / (2 sigma)) with tau = 0.45, the closed form of a capped step."""
    plan = table(sde="longcat_truncated")
    for k in (0, 1, 2):
        sigma, delta = float(plan.sigmas[k]), float(plan.sigmas[k] - plan.sigmas[k + 1])
        expected = 1 / (delta / 0.45 + 0.45 * (1 - sigma) / (2 * sigma))
        assert float(weights("exact_inverse", plan)[k]) == pytest.approx(expected, rel=1e-12)


def test_guard_is_longcat_times_eta_and_tempflow_is_the_noise() -> None:
    plan = table(eta=0.7)
    torch.testing.assert_close(weights("guard", plan), 0.7 * weights("longcat", plan), rtol=1e-12, atol=0)
    assert torch.equal(weights("tempflow", plan), plan.coefficients[:24, 2])
    assert torch.equal(weights("none", plan), torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["longcat", "exact_inverse", "guard", "tempflow", "none"])
def test_weights_of_a_window_are_a_slice_of_all_weights(kind: str) -> None:
    part = table(start=3, stop=7)
    torch.testing.assert_close(weights(kind, part), weights(kind, table())[3:7], rtol=1e-14, atol=0)
    normed = weights(kind, part, "window_mean1")
    assert float(normed.mean()) == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(normed * weights(kind, part).mean(), weights(kind, part), rtol=1e-12, atol=0)


def test_weights_need_a_window() -> None:
    with pytest.raises(UsageError, match="stochastic window"):
        loss_weights(build_step_table(FlowConfig()), ObjectiveConfig())


def surrogate(log_ratio: Tensor, advantage: Tensor, **extra: object) -> LossOutput:
    settings = {"clip": 0.1, "weight": 2.0, "denominator": 4.0, **extra}
    return clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantage, **settings)  # type: ignore[arg-type]


def test_surrogate_by_hand() -> None:
    """Ratios 0.5, 0.95, 1.2, 2 with advantages 1, -1, 2, -3 and clip 0.1: terms 0.5, -0.95, 2.2, -6."""
    ratio = torch.tensor([0.5, 0.95, 1.2, 2.0], dtype=torch.float64)
    out = surrogate(ratio.log(), torch.tensor([1.0, -1.0, 2.0, -3.0], dtype=torch.float64))
    assert float(out.loss) == pytest.approx(-(2.0 / 4.0) * (0.5 - 0.95 + 2.2 - 6.0), rel=1e-12)
    stats = out.stats.summary()
    assert stats["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert (stats["ratio_min"], stats["ratio_max"]) == pytest.approx((0.5, 2.0))
    assert (stats["clip_fraction_high"], stats["clip_fraction_low"]) == (0.25, 0.0)
    assert stats["log_ratio_abs_max"] == pytest.approx(math.log(2))
    assert stats["approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))


@given(st.floats(-1.0, 1.0), st.floats(-5.0, 5.0))
def test_gradient_vanishes_outside_the_clip_on_the_matching_side_only(log_ratio: float, advantage: float) -> None:
    inside_margin = 1e-6
    low, high = math.log(0.9), math.log(1.1)
    if min(abs(log_ratio - low), abs(log_ratio - high)) < inside_margin:
        return
    x = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    out = surrogate(x, torch.tensor([advantage], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss, x)
    clipped = (advantage > 0 and log_ratio > high) or (advantage < 0 and log_ratio < low)
    expected = 0.0 if clipped else -(2.0 / 4.0) * advantage * math.exp(log_ratio)
    assert float(gradient) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert float(out.stats.clipped_high + out.stats.clipped_low) == float(clipped)


def test_masked_samples_contribute_nothing() -> None:
    log_prob = torch.tensor([0.1, float("nan"), -0.2], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, float("nan"), -1.0], dtype=torch.float64)
    valid = torch.tensor([True, False, True])
    out = surrogate(log_prob, advantage, valid=valid)
    (gradient,) = torch.autograd.grad(out.loss, log_prob)
    kept = surrogate(log_prob.detach()[valid], advantage[valid])
    assert float(out.loss.detach()) == float(kept.loss)
    assert float(gradient[1]) == 0.0
    assert out.stats.summary() == kept.stats.summary()


def test_shares_add_up_over_any_split() -> None:
    generator = torch.Generator().manual_seed(2)
    log_ratio, advantage = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    whole = surrogate(log_ratio, advantage)
    parts = [surrogate(log_ratio[rows], advantage[rows]) for rows in (slice(0, 3), slice(3, 4), slice(4, 10))]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-12)
    together = parts[0].stats + parts[1].stats + parts[2].stats
    assert together.summary() == pytest.approx(whole.stats.summary(), rel=1e-12)


def test_statistics_of_nothing() -> None:
    nothing = surrogate(torch.zeros(2), torch.ones(2), valid=torch.zeros(2, dtype=torch.bool))
    assert float(nothing.loss) == 0.0
    assert nothing.stats.summary()["ratio_max"] == 1.0
    some = surrogate(torch.full((2,), 0.5), torch.ones(2))
    assert (nothing.stats + some.stats).summary() == some.stats.summary()


def test_reference_kl_equals_torch_distributions() -> None:
    plan = table()
    generator = torch.Generator().manual_seed(0)
    velocity, reference = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    row = plan.row(6)
    _, b, c, _ = row.tolist()
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(b * velocity, c), normal(b * reference, c)).flatten(1).mean(1)
    velocity.requires_grad_()
    kl = reference_kl(velocity, reference, row)
    torch.testing.assert_close(kl.detach(), exact, rtol=1e-12, atol=0)
    valid = torch.tensor([True, False, True])
    loss = kl_loss(kl, kl_weight=3e-4, weight=40.0, denominator=2.0, valid=valid)
    assert float(loss.detach()) == pytest.approx(3e-4 * 1600 / 2 * float(exact[valid].sum()), rel=1e-12)
    assert bool(torch.autograd.grad(loss, velocity)[0][1].eq(0).all())


def test_weighted_kl_gradient_does_not_depend_on_the_step() -> None:
    """w_t^2 (b / c)^2 is constant in t for Flow-SDE: LongCat-Video's choice of the KL weight."""
    plan = table(eta=1.0)
    difference = torch.ones(1, 4, dtype=torch.float64)
    scales = [
        float(
            kl_loss(
                reference_kl(difference, 0 * difference, plan.row(k)), kl_weight=1.0, weight=float(w), denominator=1
            )
        )
        for k, w in enumerate(weights("longcat", plan))
    ]
    assert scales[1:] == pytest.approx([0.5 * 1.5**2] * 23, rel=1e-12)
