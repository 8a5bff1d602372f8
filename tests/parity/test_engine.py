"""Exact levers give the exact gradient, and the passes they spend are those that the cost model counts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy_learner import GROUPS, SIZE, Toy, assert_close, gradient, learner_of, setting_of
from training_cases import Brightness, gradient_of, on_fake_ranks, smoke, trainer_of

from geoalign.config.flow import ObjectiveConfig
from geoalign.config.training import LeversConfig
from geoalign.errors import ConfigError
from geoalign.models.parallel import SequenceParallel
from geoalign.perf.budget import Plan, Walk, count_passes
from geoalign.rl.objective import loss_weights
from geoalign.training.processes.ranks import RankRows, Ranks
from geoalign.training.reference import ReferencePolicy


@pytest.fixture
def setting() -> SimpleNamespace:
    return setting_of(None)


def test_merged_first_step_equals_the_plain_gradient_with_clipped_members(setting: SimpleNamespace) -> None:
    # Ratios far beyond the clip range in both directions, so that about half of the members are clipped.
    spread = torch.linspace(-0.01, 0.01, GROUPS * SIZE, dtype=torch.float64)[:, None]
    moved = replace(setting.rollout, log_prob=setting.rollout.log_prob + spread)
    plain_numbers, plain = gradient(setting, moved, learner_of(setting.policy, merge_first=False))
    numbers, merged = gradient(setting, moved, learner_of(deepcopy(setting.policy)))
    assert numbers["policy/clip_fraction_high"] > 0.1 and numbers["policy/clip_fraction_low"] > 0.1
    assert_close(merged, plain)
    assert numbers["policy/loss"] == pytest.approx(plain_numbers["policy/loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("buffers", "rows", "share"),
    [(None, None, True), (None, 1, True), ("device", 1, True), ("host", 1, True), ("device", 1, False)],
)
def test_streamed_gradient_equals_the_replayed_one(buffers: str | None, rows: int | None, share: bool) -> None:
    setting = setting_of(buffers, rows, share)
    learner = learner_of(setting.policy)
    replayed_numbers, replayed = gradient(setting, setting.rollout, learner)
    first = GROUPS if share else GROUPS * SIZE
    assert learner.passes["replay"] == first + 2 * GROUPS * SIZE
    numbers, streamed = gradient(setting, setting.rollout, learner, stream=setting.stream)
    # Of a shared first step no graph is kept beside buffers: it is replayed.
    assert learner.passes["replay"] == (GROUPS if buffers and share else 0)
    assert learner.passes["backward"] == first + 2 * GROUPS * SIZE
    assert_close(streamed, replayed)
    assert numbers["policy/ratio_min"] == numbers["policy/ratio_max"] == 1.0
    assert numbers["policy/loss"] == pytest.approx(replayed_numbers["policy/loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("streamed", "buffers", "rows", "share", "seen"),
    [
        (False, None, None, True, True),
        (True, None, None, True, False),
        (True, "device", 1, True, True),
        (True, "device", 1, False, False),
    ],
)
def test_parity_compares_what_is_replayed_and_nothing_else(
    streamed: bool, buffers: str | None, rows: int | None, share: bool, seen: bool
) -> None:
    """A learner whose forward answers differently, as other kernels would; without a replay it makes none."""
    setting = setting_of(buffers, rows, share)
    learner, policy = learner_of(setting.policy), setting.policy
    learner.policy = SimpleNamespace(velocity=lambda *given: 1.01 * policy.velocity(*given))  # type: ignore[assignment]
    given = setting.sampler, setting.rollout, setting.conditioning, setting.advantage, setting.valid
    numbers = learner.update(*given, setting.stream if streamed else None)
    assert (numbers["parity/log_prob_diff_max"] > 1e-6) == seen
    assert (numbers["policy/ratio_min"] == numbers["policy/ratio_max"] == 1.0) != seen
    assert bool(learner.passes["replay"]) == seen


def test_a_poisoned_buffer_is_left_out() -> None:
    """The gradient kept for an invalid sample may hold NaN; the others must not see it."""
    clean, dirty = setting_of("device", 1), setting_of("device", 1)
    dirty.stream.gradients._table[4].fill_(float("nan"))
    _, expected = gradient(clean, clean.rollout, learner_of(clean.policy), stream=clean.stream)
    _, found = gradient(dirty, dirty.rollout, learner_of(dirty.policy), stream=dirty.stream)
    assert torch.equal(found, expected)


def test_kl_to_a_reference_adds_its_own_gradient(setting: SimpleNamespace) -> None:
    """Against autograd on the closed form of equal deviations: b^2 mean((v - v_ref)^2) / (2 c^2)."""
    policy, objective = setting.policy, ObjectiveConfig(clip=1e-4, kl_weight=0.3)
    reference = ReferencePolicy(dict(policy.named_parameters()))
    with torch.no_grad():
        policy.inner.add_(0.01)
        policy.gain.mul_(1.1)
    old = {name: p.detach().clone() for name, p in policy.named_parameters()}
    _, plain = gradient(setting, setting.rollout, learner_of(deepcopy(policy)))
    learner = learner_of(policy, objective, reference=reference)
    numbers, with_kl = gradient(setting, setting.rollout, learner)
    assert all(torch.equal(p, old[name]) for name, p in policy.named_parameters())  # the reference was put back
    assert learner.passes["reference"] == GROUPS + 2 * GROUPS * SIZE

    base, table, total = Toy(), setting.sampler.table, torch.zeros((), dtype=torch.float64)
    weights, rollout = loss_weights(table, objective), setting.rollout
    kls = []
    for position, step in enumerate(range(2, 5)):
        _, b, c, _ = table.row(step).tolist()
        state = rollout.state(position)
        count = GROUPS * SIZE // len(state)
        x = state.repeat_interleave(count, 0)
        cond, time = setting.conditioning.repeat_interleave(SIZE), table.timesteps[step].expand(len(x))
        difference = policy.velocity(x, time, cond) - base.velocity(x, time, cond).detach()
        kl = (b**2 / (2 * c**2)) * difference.square().mean(1)
        kls.append(kl.detach()[setting.valid])
        total = total + 0.3 * weights[position] ** 2 * kl[setting.valid].sum() / (11 * 3)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(total, list(policy.parameters()))])
    assert_close(with_kl - plain, expected, summands=plain)
    assert numbers["policy/reference_kl"] == pytest.approx(float(torch.stack(kls).mean()), rel=1e-12)


LEVERS: list[dict[str, Any]] = [
    {"share_prefix": False, "merge_first_step": False, "prune_source": False, "cache_phases": False},
    {"share_prefix": False, "merge_first_step": False},
    {"merge_first_step": False},
    {},
    {"streaming": "graphs"},
    {"recompute": "keep_attention"},
    {"recompute": "full"},
    {"prune_source": False},
    {"cache_phases": False},
    {"streaming": "graphs", "recompute": "full"},
    {"streaming": "host", "recompute": "keep_attention"},
    {"streaming": "device", "share_prefix": False, "merge_first_step": False},
]
WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
BRIGHT = {"weights": {}}


def test_every_lever_is_tried_by_itself() -> None:
    """Or with the one that cannot stay without it, as docs/engine.md says."""
    assert {name for levers in LEVERS if len(levers) <= 2 for name in levers} == set(LeversConfig.model_fields)


@pytest.fixture(scope="module")
def float64_reference() -> SimpleNamespace:
    trainer = trainer_of(smoke(window=WINDOW, advantage=BRIGHT), rewards={"b": Brightness()}, dtype=torch.float64)
    return SimpleNamespace(metrics=trainer.step(), gradient=gradient_of(trainer))


@pytest.mark.parametrize("levers", LEVERS, ids=lambda levers: "+".join(levers) or "default")
def test_levers_spend_the_predicted_passes_and_change_nothing_else(
    levers: dict[str, Any], float64_reference: SimpleNamespace
) -> None:
    """The whole trainer in float64, scores linear in the pixels: other batch shapes round apart, no more."""
    serial = {"rows_per_forward": 1} if levers.get("streaming") in ("host", "device") else {}
    config = smoke(levers=levers, window=WINDOW, advantage=BRIGHT, groups=serial)
    trainer = trainer_of(config, rewards={"b": Brightness()}, dtype=torch.float64)
    metrics = trainer.step()
    assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    expected = float64_reference.gradient
    assert float((gradient_of(trainer) - expected).norm() / expected.norm()) < 1e-12


def test_an_iteration_names_its_work_for_the_profilers() -> None:
    """The span tree of the documentation, as ranges of the torch profiler; the same names reach Nsight."""
    trainer = trainer_of(smoke(window=WINDOW))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        metrics = trainer.step()
    found = {event.name for event in profile.events()}
    phases = {f"rollout/{part}" for part in ("encode", "prefix", "window", "tail", "decode")}
    phases |= {f"update/{part}" for part in ("forward", "backward", "optimizer")} | {"sync/scores", "sync/numbers"}
    assert phases | {f"reward/{name}" for name in trainer.rewards} <= found
    assert {f"time/{name}_s" for name in phases} <= metrics.keys()
    parts = sum(metrics[f"time/{name}_s"] for name in phases if not name.startswith("sync/"))
    assert parts + metrics["time/other_s"] <= metrics["time/iteration_s"]


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


def test_kl_in_the_loop_counts_its_forwards_and_starts_at_zero() -> None:
    trainer = trainer_of(smoke(objective={"kl_weight": 0.1}, window=WINDOW))
    first, second = trainer.step(), trainer.step()
    # The reference runs on batches of another size, which round differently: squares of some 1e-8.
    assert first["policy/reference_kl"] == pytest.approx(0, abs=1e-12) and second["policy/reference_kl"] > 1e-9
    assert first["perf/forward_equivalents"] == first["perf/predicted_forward_equivalents"]


@pytest.mark.parametrize(
    "changes",
    [
        {"levers": {"streaming": "graphs"}, "optim": {"updates_per_rollout": 2}},
        {"levers": {"share_prefix": False}},
        {"levers": {"streaming": "graphs"}, "objective": {"kl_weight": 0.1}},
        {"levers": {"streaming": "device"}},
        {"levers": {"streaming": "graphs", "merge_first_step": False}},
        {"levers": {"streaming": "host"}, "groups": {"rows_per_forward": 1}, "parallel": {"engine": "fsdp"}},
    ],
)
def test_levers_that_would_not_be_exact_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ConfigError), match="levers"):
        smoke(**changes)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_layouts_give_one_result(size: int, float64_reference: SimpleNamespace) -> None:
    """2 groups of 4 in float64: whole on 2 ranks, split over 4 and over 8."""
    config = smoke(window=WINDOW, advantage=BRIGHT)

    def work(ranks: Ranks) -> tuple[dict[str, float], Tensor]:
        trainer = trainer_of(config, ranks, rewards={"b": Brightness()}, dtype=torch.float64)
        return trainer.step(), gradient_of(trainer)

    results = on_fake_ranks(size, work)
    expected = float64_reference
    for metrics, mine in results:
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
        assert torch.equal(mine, results[0][1])  # replicas stay equal bit for bit
        assert float((mine - expected.gradient).norm() / expected.gradient.norm()) < 1e-12
        for name in ("reward/bright", "policy/grad_norm", "policy/loss"):
            assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-12)


@pytest.mark.parametrize(("size", "sequence"), [(2, 2), (4, 4), (4, 2)])
def test_ranks_that_share_tokens_give_one_result(size: int, sequence: int, float64_reference: SimpleNamespace) -> None:
    """Ulysses in float64: two or four ranks share every video, alone and with two shares of the groups beside."""
    config = smoke(window=WINDOW, advantage=BRIGHT, parallel={"sequence": sequence})
    counts: list[int] = []

    def work(ranks: Ranks) -> tuple[dict[str, float], Tensor]:
        trainer = trainer_of(config, ranks, rewards={"b": Brightness()}, dtype=torch.float64)
        trainer.policy.model.blocks[0].register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].x.shape[1]))
        return trainer.step(), gradient_of(trainer)

    for metrics, mine in on_fake_ranks(size, work, sequence):
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
        expected = float64_reference
        assert float((mine - expected.gradient).norm() / expected.gradient.norm()) < 1e-12
        for name in ("reward/bright", "policy/grad_norm", "policy/loss"):
            assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-12)
    assert set(counts) == {108 // sequence}  # 4 target and 5 source frames of 3 x 4 tokens


def test_sequences_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"must divide model\.heads"):
        smoke(parallel={"sequence": 3})
    # 4 x 3 x 3 target and 5 x 3 x 3 source tokens; the model refuses videos of other sizes than the configured too.
    with pytest.raises(ValidationError, match="must divide the 45 source tokens"):
        smoke(parallel={"sequence": 4}, data={"width": 48})
    with pytest.raises(ConfigError, match="does not divide the 45 source tokens"):
        SequenceParallel("none", 0, 4).layout(36, 36 + 45)


def test_ranks_cover_every_row_once() -> None:
    for conditions, size, world in ((8, 12, 2), (8, 12, 8), (2, 12, 8), (1, 12, 4)):
        ranks = [SimpleNamespace(data_rank=r, size=world, sequence=1, sequence_rank=0) for r in range(world)]
        rows = torch.cat([RankRows.of(conditions, size, rank).rows for rank in ranks])  # type: ignore[arg-type]
        assert torch.equal(rows.sort().values, torch.arange(conditions * size))
    with pytest.raises(ConfigError, match="cannot be dealt"):
        RankRows.of(3, 12, SimpleNamespace(data_rank=0, size=2, sequence=1, sequence_rank=0))  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "keep_attention", "full"])
def test_ratio_is_one_bitwise_in_bfloat16(recompute: str) -> None:
    """Matrices in bf16, residual stream, latents and masters in float32: the same bits in rollout and learner."""
    trainer = trainer_of(smoke(levers={"recompute": recompute}, window=WINDOW, run={"dtype": "bfloat16"}))
    assert trainer.policy.model.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    metrics = trainer.step()
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/grad_norm"] > 0
