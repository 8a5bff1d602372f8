"""Rollout and learner must agree bit for bit, and levers must not change the result (rules R2, R5)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_cases import Conditions, lively_policy, smoke, trainer_of

from geoalign.config.schema import Config
from geoalign.errors import RunError
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.models.dit import RetakeDiT
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rl.window import WindowSchedule


@pytest.fixture(scope="module")
def config() -> Config:
    return smoke()


@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "longcat_truncated"])
def test_ratio_is_one_bitwise_before_the_first_update(config: Config, sde: str) -> None:
    flow = config.flow.model_copy(update={"sde": sde, "eta": 0.6, "eta_by_step": ()})
    window = config.window.model_copy(update={"kind": "fixed", "start": 1, "size": 3, "max_start": None})
    policy = lively_policy(config)
    table = build_step_table(flow, WindowSchedule(window, flow.steps)(0))
    sampler = FlowSampler(table, group_size=4)
    batch = Conditions(config).batch(0, [0, 1])
    precomputed, groups = policy.precompute(policy.condition(batch)), torch.arange(2)
    noise = initial_noise(policy.latent_shape(batch), 0, 0, groups)
    rollout = sampler.rollout(policy.velocity, precomputed, noise, seed=0, iteration=0, group_ids=groups)
    for position in range(3):
        for rows in sampler.replay_batches(rollout, position):
            again = sampler.replay(policy.velocity, rollout, position, precomputed, rows)
            assert torch.equal(again.log_prob.detach(), rollout.log_prob[rows, position])


def test_shared_prefix_saves_forwards_and_changes_nothing(config: Config) -> None:
    """Bit for bit where the network is called with one row at a time, hence with one batch shape (kernels of another
    shape round differently)."""
    policy = lively_policy(config)
    table = build_step_table(config.flow, WindowSchedule(config.window, config.flow.steps)(2))
    batch, groups = Conditions(config).batch(0, [0, 1]), torch.arange(2)
    precomputed, noise = (
        policy.precompute(policy.condition(batch)),
        initial_noise(policy.latent_shape(batch), 0, 0, groups),
    )
    shared, alone = (
        FlowSampler(table, 4, share_prefix=share, rows_per_forward=1).rollout(
            policy.velocity, precomputed, noise, seed=0, iteration=0, group_ids=groups
        )
        for share in (True, False)
    )
    assert torch.equal(shared.final, alone.final) and torch.equal(shared.log_prob, alone.log_prob)
    assert torch.equal(shared.x_next, alone.x_next)
    # Window at step 2 of 6, one step: prefix 2 and first window forward once a group, three tail steps a member.
    assert shared.forwards.total == 2 * (2 + 1) + 8 * 3 and alone.forwards.total == 8 * 6


def test_groups_do_not_depend_on_their_neighbours(config: Config) -> None:
    """R5: the noise of a group is named by its global id, whatever else is in the batch."""
    shape = (24, 4, 3, 4)
    both = initial_noise(shape, 7, 5, torch.tensor([3, 9]))
    assert torch.equal(both[1:], initial_noise(shape, 7, 5, torch.tensor([9])))
    assert not torch.equal(both[0], both[1])


def test_one_iteration_moves_only_self_attention(config: Config) -> None:
    trainer = trainer_of(config)
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    metrics = trainer.step()
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    for name, parameter in trainer.policy.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".self_attn." in name), name


def test_drift_between_rollout_and_learner_stops_the_run(config: Config) -> None:
    """A network that answers differently the second time it sees the window, as other kernels would."""
    trainer, calls = trainer_of(config), []
    original = RetakeDiT.forward

    def drifting(self, x, *rest):  # type: ignore[no-untyped-def]
        velocity = original(self, x, *rest)
        if torch.is_grad_enabled():
            calls.append(len(x))
            velocity = velocity * (1.0 if len(calls) == 1 else 1.01)
        return velocity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetakeDiT, "forward", drifting)
        with pytest.raises(RunError, match="do not run the same artefact"):
            trainer.step()


def test_checkpointed_trainer_continues_bitwise(config: Config, tmp_path: Path) -> None:
    """4 iterations = 2 + save + load into a fresh process's objects + 2."""
    from geoalign.training.checkpoint import RunSettings, load_checkpoint, save_checkpoint

    straight = trainer_of(config)
    losses = [straight.step()["policy/grad_norm"] for _ in range(4)]
    first = trainer_of(config)
    for _ in range(2):
        first.step()
    path = save_checkpoint(tmp_path, first.state(), config=RunSettings("x", {}), keep=2)
    second = trainer_of(config)
    second.load(load_checkpoint(path, config=RunSettings("x", {})))
    assert [second.step()["policy/grad_norm"] for _ in range(2)] == losses[2:]
    for name, parameter in straight.engine.trained.items():
        assert torch.equal(parameter, second.engine.trained[name]), name


def test_several_updates_per_rollout_use_each_member_once(config: Config) -> None:
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"updates_per_rollout": 2})})
    metrics = trainer_of(changed).step()
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/log_ratio_abs_max"] > 0  # the second update sees a moved policy


class TestFailures:
    def test_a_sample_that_was_singled_out_leaves_the_logged_means(self, config: Config) -> None:
        """A guarded reward has no metres for the sample it lost; the mean over the others stays a number."""
        trainer = trainer_of(config)
        inner, calls = trainer.rewards["geometry"], []

        class Choking:
            name, keys = inner.name, inner.keys

            def __call__(self, videos, batch):  # type: ignore[no-untyped-def]
                calls.append(len(videos))
                if len(videos) > 1 or len(calls) == 3:
                    raise RuntimeError("cannot score this")
                return inner(videos, batch)

        trainer.rewards = {**trainer.rewards, "geometry": GuardedReward(Choking(), retries=1)}
        metrics = trainer.step()
        assert metrics["failures/geometry"] == 1
        assert all(
            math.isfinite(metrics[f"reward/{name}"]) for name in ("trans", "trans_m", "rot_deg", "lost_fraction")
        )

    def test_failing_scorer_masks_its_samples(self, config: Config) -> None:
        trainer = trainer_of(config.model_copy(update={"scoring": config.scoring.model_copy(update={"chunk": 8})}))
        inner = trainer.rewards["geometry"]

        class Flaky:
            name, keys = "geometry", inner.keys

            def __call__(self, videos, batch):  # type: ignore[no-untyped-def]
                output = inner(videos, batch)
                scores = {key: value.clone() for key, value in output.scores.items()}
                scores["trans"][0] = float("nan")
                return type(output)(scores, output.valid, output.parts, output.diagnostics)

        trainer.rewards = {**trainer.rewards, "geometry": Flaky()}
        metrics = trainer.step()
        assert metrics["failures/geometry"] == 1 and metrics["reward/invalid_fraction"] == pytest.approx(1 / 8)
        assert all(torch.isfinite(p).all() for p in trainer.engine.trained.values())

    def test_too_many_failures_stop_with_the_cause(self, config: Config) -> None:
        trainer = trainer_of(config)

        class Broken:
            name, keys = "geometry", ("rot", "trans")

            def __call__(self, videos, batch):  # type: ignore[no-untyped-def]
                raise RuntimeError("out of memory")

        trainer.rewards = {**trainer.rewards, "geometry": Broken()}
        with pytest.raises(RunError, match="geometry: 8"):
            trainer.step()

    def test_nan_from_the_policy_is_masked_and_counted(self, config: Config) -> None:
        failures = config.failures.model_copy(update={"max_invalid_fraction": 0.6})
        groups = config.groups.model_copy(update={"rows_per_forward": 8})
        generous = config.model_copy(update={"failures": failures, "groups": groups})
        trainer = trainer_of(generous)
        original, calls = RetakePolicy.fast_velocity, []

        def poisoned(self, x, timestep, precomputed):  # type: ignore[no-untyped-def]
            velocity = original(self, x, timestep, precomputed)
            calls.append(len(x))
            if len(x) == 8 and calls.count(8) == 1:  # the first tail step of all members: poison one of them
                velocity.value[5] = float("nan")
            return velocity

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RetakePolicy, "fast_velocity", poisoned)
            metrics = trainer.step()
        assert metrics["failures/policy"] == 1
        assert all(torch.isfinite(p).all() for p in trainer.engine.trained.values())


def test_scoring_in_chunks_beside_the_decode_changes_nothing(config: Config) -> None:
    """Chunks and overlap are a matter of time and memory: scores to rounding, overlap itself to the last bit."""
    found = {}
    for name, chosen in {"all": {}, "turn": {"chunk": 3}, "beside": {"chunk": 3, "beside_decode": True}}.items():
        trainer = trainer_of(smoke(scoring=chosen))
        metrics = [trainer.step() for _ in range(2)]
        found[name] = [{k: v for k, v in m.items() if not k.startswith(("time/", "perf/"))} for m in metrics]
    assert found["beside"] == found["turn"]
    # Another batch shape inside codec and aligner: float32 roundings (2^-24 each, some 16 of them). Only before the
    # first update: Adam divides a gradient that is all rounding by itself, so afterwards the two are two runs.
    assert found["turn"][0] == pytest.approx(found["all"][0], rel=1e-6, abs=1e-6)
