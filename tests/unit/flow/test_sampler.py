"""Rollout, replay and prefix sharing: same numbers whatever is shared or split, exact counts, analytic gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conditions import Cond
from torch import Tensor, nn

from geoalign.config.flow import FlowConfig, ObjectiveConfig
from geoalign.errors import UsageError
from geoalign.flow.policy import PhasedPolicy
from geoalign.flow.rollout import ForwardCount, Rollout
from geoalign.flow.sampler import FlowSampler, ObservedStep, initial_noise
from geoalign.flow.table import StepSet, StepTable, StepWindow, build_step_table
from geoalign.rl.objective import clipped_surrogate, loss_weights
from geoalign_kernels import inside_exact_only

CONDITIONS, GROUP, SHAPE = 3, 4, (2, 3, 5)
SEED, ITERATION = 11, 6
GROUP_IDS = torch.tensor([40, 7, 1000])


def elementwise(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """A policy whose result per sample cannot depend on the batch."""
    broadcast = (-1, *[1] * (x.dim() - 1))
    return torch.tanh(1.3 * x + cond.z.to(x).view(broadcast)) + (timestep / 1000).view(broadcast)


class SmallNet(nn.Module):
    """A policy with matrix products, whose rounding may depend on the batch; float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(32, 16, dtype=torch.float64)
        self.outer = nn.Linear(16, 30, dtype=torch.float64)

    def forward(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        features = torch.cat([x.flatten(1), timestep[:, None] / 1000, cond.z.double()[:, None]], 1)
        return self.outer(torch.tanh(self.inner(features))).view_as(x)


WINDOW = StepWindow(2, 5)


def table(steps: int = 8, window: StepSet | None = WINDOW, **fields: object) -> StepTable:
    return build_step_table(FlowConfig(steps=steps, shift=3.0, **fields), window)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Cond, Tensor]:
    cond = Cond(torch.tensor([0.3, -0.7, 1.1], dtype=dtype))
    return cond, initial_noise(SHAPE, SEED, ITERATION, GROUP_IDS).to(dtype)


def roll(sampler: FlowSampler, policy, dtype: torch.dtype = torch.float32, **extra: object) -> Rollout:  # type: ignore[no-untyped-def]
    cond, x_init = inputs(dtype)
    return sampler.rollout(policy, cond, x_init, seed=SEED, iteration=ITERATION, group_ids=GROUP_IDS, **extra)


def assert_same(first: Rollout, second: Rollout) -> None:
    for name in ("x_next", "log_prob", "final"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


FLASH = {"tail_ratio": 0.7, "tail_solver": "dpm2m"}


@pytest.mark.parametrize("fields", [{}, FLASH, {"sde": "cps", "eta": 0.8}, {"sde": "dance", "t_dtype": "bfloat16"}])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_sharing_and_splitting_change_no_bit(fields: dict[str, object], share: bool, rows: int | None) -> None:
    whole = roll(FlowSampler(table(**fields), GROUP), elementwise)
    other = roll(FlowSampler(table(**fields), GROUP, share_prefix=share, rows_per_forward=rows), elementwise)
    assert_same(whole, other)
    assert bool(torch.isfinite(whole.final).all())


def test_sharing_equals_the_unshared_run_on_a_network_in_float64() -> None:
    net = SmallNet()
    shared = roll(FlowSampler(table(**FLASH), GROUP), net, torch.float64)
    apart = roll(FlowSampler(table(**FLASH), GROUP, share_prefix=False), net, torch.float64)
    # Batch-shape rounding of 1e-16 passes through seven steps of slope below 10 each.
    torch.testing.assert_close(shared.final, apart.final, rtol=0, atol=1e-12)
    torch.testing.assert_close(shared.log_prob, apart.log_prob, rtol=0, atol=1e-12)


def test_forward_counts_are_exact() -> None:
    example = FlowSampler(table(12, StepWindow(3, 7)), 12)
    cond, x_init = Cond(torch.zeros(1)), torch.zeros(1, 2)
    run = {"seed": 0, "iteration": 0, "group_ids": torch.tensor([0])}
    shared = example.rollout(elementwise, cond, x_init, **run).forwards
    assert shared == ForwardCount(prefix=3, window=1 + 3 * 12, tail=5 * 12)
    assert shared.total == 100
    apart = FlowSampler(example.table, 12, share_prefix=False).rollout(elementwise, cond, x_init, **run).forwards
    assert apart.total == 144
    assert shared + apart == ForwardCount(39, 85, 120)


def test_counts_are_what_the_policy_saw() -> None:
    seen = {"prefix": 0, "window": 0, "tail": 0}

    def phase(name: str):  # type: ignore[no-untyped-def]
        def velocity(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
            # Before the window runs what the window runs, and takes no gradients.
            seen["prefix" if name == "window" and not torch.is_grad_enabled() else name] += x.shape[0]
            assert timestep.shape == x.shape[:1] == cond.z.shape
            assert name == "window" or not torch.is_grad_enabled()
            return elementwise(x, timestep, cond)

        return velocity

    policy = PhasedPolicy(window=phase("window"), tail=phase("tail"))
    run = roll(FlowSampler(table(**FLASH), GROUP, rows_per_forward=2), policy)
    assert ForwardCount(**seen) == run.forwards
    assert not run.log_prob.requires_grad and not run.final.requires_grad


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [None, 2])
def test_replay_equals_rollout_bitwise(share: bool, rows: int | None) -> None:
    sampler = FlowSampler(table(), GROUP, share_prefix=share, rows_per_forward=rows)
    net = SmallNet().float()
    cond, _ = inputs()

    def policy(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        features = torch.cat([x.flatten(1), timestep[:, None] / 1000, cond.z[:, None]], 1)
        return net.outer(torch.tanh(net.inner(features))).view_as(x)

    run = roll(sampler, policy)
    for position in range(run.num_window_steps):
        batches = sampler.replay_batches(run, position)
        assert [index for batch in batches for index in range(batch.start, batch.stop)] == list(range(run.num_rows))
        for batch in batches:
            again = sampler.replay(policy, run, position, cond, batch).log_prob
            assert torch.equal(again, run.log_prob[batch, position])
            assert again.requires_grad


def test_replay_of_any_rows() -> None:
    sampler = FlowSampler(table(), GROUP)
    run = roll(sampler, elementwise)
    cond, _ = inputs()
    for position in range(run.num_window_steps):
        again = sampler.replay(elementwise, run, position, cond, slice(3, 10)).log_prob
        assert torch.equal(again, run.log_prob[3:10, position])


def test_log_prob_gradient_is_the_analytic_score() -> None:
    """d/dtheta of the mean Gaussian log-density, against torch.distributions in float64."""
    sampler = FlowSampler(table(), GROUP)
    net = SmallNet()
    run = roll(sampler, net, torch.float64)
    cond, _ = inputs(torch.float64)
    steps = sampler.table.window.steps  # type: ignore[union-attr]
    for position in range(run.num_window_steps):
        weights = torch.linspace(-1, 1, run.num_rows, dtype=torch.float64)
        ours = torch.autograd.grad(
            (weights * sampler.replay(net, run, position, cond).log_prob).sum(), net.parameters()
        )
        a, b, c, _ = run.table.row(steps[position]).tolist()
        x = run.state(position).repeat_interleave(run.num_rows // run.state(position).shape[0], 0)
        timestep = torch.full((run.num_rows,), float(run.table.timesteps[steps[position]]), dtype=torch.float64)
        mean = a * x + b * net(x, timestep, cond.repeat_interleave(GROUP))
        density = torch.distributions.Normal(mean, c).log_prob(run.x_next[position]).flatten(1).mean(1)
        torch.testing.assert_close(density.detach(), run.log_prob[:, position], rtol=0, atol=1e-12)
        truth = torch.autograd.grad((weights * density).sum(), net.parameters())
        for mine, theirs in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def grpo_gradient(sampler: FlowSampler, run: Rollout, net: SmallNet, advantage: Tensor, clip: float):  # type: ignore[no-untyped-def]
    """Gradients of the whole update, and how many (sample, step) pairs were clipped."""
    cond, _ = inputs(torch.float64)
    weights = loss_weights(run.table, ObjectiveConfig()).tolist()
    denominator = float(run.num_rows * run.num_window_steps)
    total = torch.zeros((), dtype=torch.float64)
    clipped = 0.0
    for position, weight in enumerate(weights):
        log_prob = sampler.replay(net, run, position, cond).log_prob
        out = clipped_surrogate(
            log_prob, run.log_prob[:, position], advantage, clip=clip, weight=weight, denominator=denominator
        )
        total = total + out.loss
        clipped += float(out.stats.clipped_high + out.stats.clipped_low)
    return torch.autograd.grad(total, net.parameters()), clipped


def test_merged_first_step_gives_the_plain_gradient_with_clipped_members() -> None:
    net = SmallNet()
    shared, apart = (FlowSampler(table(), GROUP, share_prefix=share) for share in (True, False))
    runs = [roll(sampler, net, torch.float64) for sampler in (shared, apart)]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    advantage = torch.linspace(-1.5, 2.0, CONDITIONS * GROUP, dtype=torch.float64)
    merged, clipped = grpo_gradient(shared, runs[0], net, advantage, clip=1e-3)
    assert 0 < clipped < CONDITIONS * GROUP * 3
    plain, _ = grpo_gradient(apart, runs[1], net, advantage, clip=1e-3)
    for mine, theirs in zip(merged, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_streamed_gradients_combine_to_the_first_update() -> None:
    """Per-sample gradients taken during the rollout, weighted once the advantages are known."""
    net = SmallNet()
    parameters = list(net.parameters())
    weights = loss_weights(table(), ObjectiveConfig()).tolist()
    advantage = torch.linspace(-1.5, 2.0, CONDITIONS * GROUP, dtype=torch.float64)
    buffers: dict[int, list[Tensor]] = {}

    def observer(step: ObservedStep) -> None:
        for local, row in enumerate(range(step.rows.start, step.rows.stop)):
            loss = weights[step.position] * step.log_prob[local]
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            known = buffers.get(row, [torch.zeros_like(g) for g in grads])
            buffers[row] = [k + g for k, g in zip(known, grads, strict=True)]

    sampler = FlowSampler(table(), GROUP, rows_per_forward=2)
    run = roll(sampler, net, torch.float64, observer=observer)
    truth, _ = grpo_gradient(sampler, run, net, advantage, clip=1e-4)
    count = run.num_rows * run.num_window_steps
    for index, theirs in enumerate(truth):
        mine = -sum(advantage[row] * buffers[row][index] for row in range(run.num_rows)) / count
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_noise_depends_on_global_ids_only() -> None:
    """Two ranks with parts of the conditions, or parts of the members, draw what one rank draws."""
    cond, x_init = inputs()
    run = {"seed": SEED, "iteration": ITERATION}
    whole = roll(FlowSampler(table(), GROUP), elementwise)
    one = FlowSampler(table(), GROUP).rollout(
        elementwise, Cond(cond.z[1:2]), x_init[1:2], group_ids=GROUP_IDS[1:2], **run
    )
    assert torch.equal(one.final, whole.final[GROUP : 2 * GROUP])
    half = FlowSampler(table(), 2).rollout(
        elementwise, cond, x_init, group_ids=GROUP_IDS, member_ids=torch.tensor([2, 3]), **run
    )
    expected = whole.final.view(CONDITIONS, GROUP, *SHAPE)[:, 2:].flatten(0, 1)
    assert torch.equal(half.final, expected)
    later = FlowSampler(table(), GROUP).rollout(elementwise, cond, x_init, group_ids=GROUP_IDS, seed=SEED, iteration=7)
    assert not torch.equal(later.final, whole.final)


def test_members_differ_and_start_in_one_state() -> None:
    run = roll(FlowSampler(table(), GROUP), elementwise)
    assert run.shared and run.x_start.shape[0] == CONDITIONS
    assert torch.equal(run.state(0), run.x_start) and torch.equal(run.state(2), run.x_next[1])
    members = run.final.view(CONDITIONS, GROUP, -1)
    assert bool((members[:, 0] - members[:, 1]).abs().amax(1).gt(0.01).all())


def test_initial_noise_per_member_needs_an_unshared_prefix() -> None:
    cond, _ = inputs()
    x_init = initial_noise(SHAPE, SEED, 0, GROUP_IDS.repeat_interleave(GROUP), sample=torch.arange(GROUP).repeat(3))
    run = {"seed": SEED, "iteration": 0, "group_ids": GROUP_IDS}
    apart = FlowSampler(table(), GROUP, share_prefix=False).rollout(elementwise, cond, x_init, **run)
    assert apart.x_start.shape[0] == CONDITIONS * GROUP and not apart.shared
    with pytest.raises(UsageError, match="12 samples"):
        FlowSampler(table(), GROUP).rollout(elementwise, cond, x_init, **run)


def test_deterministic_sampling_equals_its_own_steps() -> None:
    cond, x = inputs()
    plan = table(window=None)
    sampled = FlowSampler(plan, rows_per_forward=2).sample(elementwise, cond, x)
    for k in range(plan.num_steps):
        timestep = torch.full((CONDITIONS,), float(plan.timesteps[k]))
        a, b, _, _ = plan.row(k).float().tolist()
        x = a * x + b * elementwise(x, timestep, cond)
    # float32 with another association of the same two products.
    torch.testing.assert_close(sampled, x, rtol=0, atol=2e-6)


def test_neutralised_rows_are_finite_and_named() -> None:
    def policy(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        velocity = elementwise(x, timestep, cond)
        if x.shape[0] == CONDITIONS * GROUP:
            velocity = velocity.index_fill(0, torch.tensor([5]), float("nan"))
        return velocity

    cleaned, finite = roll(FlowSampler(table(), GROUP), policy).neutralised()
    assert finite.tolist() == [row != 5 for row in range(CONDITIONS * GROUP)]
    for name in ("x_start", "x_next", "log_prob", "final"):
        assert bool(torch.isfinite(getattr(cleaned, name)).all())
    clean = roll(FlowSampler(table(), GROUP), elementwise)
    assert torch.equal(cleaned.final[finite], clean.final[finite])
    assert float(cleaned.x_start.abs().amin()) > 0

    def broken_group(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return elementwise(x, timestep, cond) / (cond.z > 0).to(x).view(-1, 1, 1, 1)

    cleaned, finite = roll(FlowSampler(table(), GROUP), broken_group).neutralised()
    assert finite.view(CONDITIONS, GROUP).all(1).tolist() == [True, False, True]
    assert float(cleaned.x_start[1].abs().max()) == 0.0


def test_a_table_without_window_cannot_be_rolled_out_and_vice_versa() -> None:
    cond, x = inputs()
    with pytest.raises(UsageError, match="no stochastic window"):
        roll(FlowSampler(table(window=None), GROUP), elementwise)
    with pytest.raises(UsageError, match="without window"):
        FlowSampler(table()).sample(elementwise, cond, x)


@pytest.mark.parametrize("steps", [WINDOW, StepSet((2, 5))])
@pytest.mark.parametrize("share", [True, False])
def test_only_the_window_and_its_replay_are_held_to_exact_kernels(share: bool, steps: StepSet) -> None:
    seen: dict[str, set[bool]] = {"before": set(), "window": set(), "tail": set(), "observer": set()}

    def phase(name: str) -> Callable[[Tensor, Tensor, Cond], Tensor]:
        def velocity(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
            before = name == "window" and float(timestep[0]) > float(sampler.table.timesteps[steps.start])
            seen["before" if before else name].add(inside_exact_only())
            return elementwise(x, timestep, cond)

        return velocity

    policy = PhasedPolicy(window=phase("window"), tail=phase("tail"))
    sampler = FlowSampler(table(window=steps), GROUP, share_prefix=share)
    cond, ids = Cond(torch.zeros(CONDITIONS)), GROUP_IDS
    x = torch.randn(CONDITIONS, *SHAPE)
    rollout = sampler.rollout(
        policy, cond, x, seed=SEED, iteration=ITERATION, group_ids=ids,
        observer=lambda step: seen["observer"].add(inside_exact_only()),
    )  # fmt: skip
    assert seen == {"before": {False}, "window": {True}, "tail": {False}, "observer": {True}}
    seen["window"].clear()
    sampler.replay(policy, rollout, 1, cond)
    assert seen["window"] == {True} and not inside_exact_only()
