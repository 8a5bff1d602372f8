"""The sampler step and its density against torch.distributions and finite differences."""

from __future__ import annotations

import pytest
import torch

import geoalign_kernels as gk

TABLE = (0.98, -0.04, 0.3, 0.0)


def test_log_prob_is_the_mean_gaussian_density_and_its_score() -> None:
    x, velocity = torch.randn(3, 2, 7), torch.randn(3, 2, 7, requires_grad=True)
    step = gk.flow_step(x, velocity, TABLE, key=gk.NoiseKey(1, 2, 3, torch.arange(3), 4))
    exact = velocity.detach().double().requires_grad_()
    normal = torch.distributions.Normal(0.98 * x.double() - 0.04 * exact, 0.3)
    truth = normal.log_prob(step.x_next.detach().double()).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob.double(), truth, rtol=0, atol=1e-6)
    step.log_prob.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(velocity.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("guided", [False, True])
def test_replay_equals_rollout_bit_for_bit(guided: bool) -> None:
    x, velocity, other = torch.randn(3, 4, 500).unbind(0)
    extra = {"velocity_uncond": other, "guidance": 3.5} if guided else {}
    step = gk.flow_step(x, velocity, TABLE, key=gk.NoiseKey(1, 2, 3, torch.arange(4), 4), **extra)
    assert torch.equal(step.log_prob, gk.flow_log_prob(x, velocity, step.x_next.clone(), TABLE, **extra))


def test_gradients_agree_with_finite_differences() -> None:
    leaf = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    table = torch.tensor([[0.9, -0.1, 0.3, 0.2], [0.8, -0.2, 0.4, 0.1]], dtype=torch.float64)

    def step(x: torch.Tensor, v: torch.Tensor, n: torch.Tensor, u: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return gk.flow_step(x, v, table, noise=n, velocity_uncond=u, guidance=2.0, m_prev=m).x_next

    assert torch.autograd.gradcheck(step, leaf)
    fixed, x_next = leaf[0].detach(), torch.randn(2, 5, dtype=torch.float64)
    density = lambda v, u: gk.flow_log_prob(fixed, v, x_next, table, velocity_uncond=u, guidance=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(density, leaf[1:3])


def test_impossible_steps_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="exactly one"):
        gk.flow_step(x, x, TABLE)
    with pytest.raises(ValueError, match="mixes"):
        gk.flow_step(x, x, torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0]]), noise=x)
    with pytest.raises(ValueError, match="deterministic"):
        gk.flow_log_prob(x, x, x, (1, 0, 0, 0))
    assert gk.flow_step(x, x, (1, -0.1, 0, 0)).log_prob is None
