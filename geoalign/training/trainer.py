"""The RL loop. One iteration: conditions, window, rollouts, scores, advantages, update, log, checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import ConfigError, RunError
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.perf.budget import PassCount, Plan, Walk, count_passes
from geoalign.perf.timer import PhaseTimer
from geoalign.rewards.base import Reward
from geoalign.rl.advantage import Advantage, group_advantage
from geoalign.rl.policy import RetakePolicy
from geoalign.rl.score import Scores, score_videos
from geoalign.rl.window import WindowSchedule
from geoalign.training.checkpoint import TrainState, optimizer_state, restore
from geoalign.training.engine import Engine, LocalEngine, gather_scores, place_groups
from geoalign.training.learner import Learner
from geoalign.training.optim import MovingAverage, build_adamw, freeze_all_but, set_learning_rate
from geoalign.training.streaming import StreamingBackward
from geoalign.types import RetakeBatch
from geoalign_kernels import philox_uniform

logger = logging.getLogger(__name__)
SHUFFLE_STREAM = 6


class ConditionSource(Protocol):
    """Conditions as a pure function of (seed, iteration, group id)."""

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        """The conditions of these groups."""
        ...


@runtime_checkable
class PrefetchingSource(ConditionSource, Protocol):
    """A source that can work ahead and tells what it did."""

    def prefetch(self, iteration: int, group_ids: list[int]) -> None:
        """Start assembling a batch in the background."""
        ...

    def telemetry(self) -> dict[str, float]:
        """Named counters since the start of the process."""
        ...


class Trainer:
    """Runs iterations; holds everything that a checkpoint restores."""

    def __init__(
        self,
        config: Config,
        policy: RetakePolicy,
        source: ConditionSource,
        rewards: Mapping[str, Reward],
        engine: Engine | None = None,
    ) -> None:
        self.config, self.policy, self.source, self.rewards = config, policy, source, rewards
        self.schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
        self.engine = LocalEngine() if engine is None else engine
        self.place = place_groups(
            config.groups.conditions, config.groups.size, self.engine.rank, self.engine.world_size
        )
        if self.place.member_ids.numel() < config.groups.size and config.optim.updates_per_rollout > 1:
            raise ConfigError(
                "optim.updates_per_rollout > 1 needs whole groups on every rank: use a number of ranks that divides "
                f"groups.conditions {config.groups.conditions}"
            )
        policy.model.recompute, policy.model.prune_source = config.levers.recompute, config.levers.prune_source
        trained = freeze_all_but(policy.model, config.optim.trainable)
        self.learner = Learner(
            policy,
            trained,
            build_adamw(trained, config.optim),
            MovingAverage(trained, config.optim.ema),
            config.objective,
            config.optim,
            merge_first=config.levers.merge_first_step,
            engine=self.engine,
        )
        self.iteration = 0
        self.notes: dict[str, Any] = {}

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics.

        Raises:
            RunError: too many invalid samples, or log-probabilities of rollout and replay differ beyond the bound.
        """
        config, clock, place = self.config, PhaseTimer(), self.place
        groups, size = place.group_ids, place.member_ids.numel()
        window = self.schedule(self.iteration)
        sampler = self._sampler(window)
        with clock.phase("data"):
            batch = self._draw(groups.tolist())
        stream = StreamingBackward() if config.levers.streaming else None
        with clock.phase("rollout/encode"), torch.set_grad_enabled(stream is not None):
            conditioning = self.policy.condition(batch)
            prepared = self.policy.prepare(conditioning)
        with clock.phase("rollout/denoise"):
            noise = initial_noise(self.policy.latent_shape(batch), config.run.seed, self.iteration, groups)
            rollout, usable = sampler.rollout(
                self.policy.velocity,
                prepared,
                noise,
                seed=config.run.seed,
                iteration=self.iteration,
                group_ids=groups,
                member_ids=place.member_ids,
                observer=stream,
            ).neutralised()
        with clock.phase("rollout/decode"):
            members = batch.repeat_interleave(size)
            videos = self.policy.decode(rollout.final, members)
        with clock.phase("reward"):
            scores = gather_scores(self.engine, place, score_videos(self.rewards, videos, members, usable))
            self._refuse_too_many_failures(scores)
        with clock.phase("advantage"):
            group_ids = torch.arange(config.groups.conditions).repeat_interleave(config.groups.size)
            advantage = group_advantage(scores.scores, scores.valid, group_ids, config.advantage)
            values = self._shuffled(advantage.values) if config.train.shuffle_advantages else advantage.values
        with clock.phase("update"):
            factor = set_learning_rate(self.learner.optimizer, config.optim, self.iteration, config.train.iterations)
            # A masked row still runs through the held graphs, where zero times NaN is NaN: replay zeros instead.
            held = stream if bool(usable.all()) else None
            rows = place.rows
            update = self.learner.update(sampler, rollout, conditioning, values[rows], scores.valid[rows], held)
        self._refuse_drift(update["parity/log_prob_diff_max"])
        self.iteration += 1
        seconds = clock.collect() | {f"time/reward/{name}_s": value for name, value in scores.seconds.items()}
        where = {"window/start": float(window.start), "optim/lr_factor": factor}
        counts = self._counts(rollout, sampler)
        data = self.source.telemetry() if isinstance(self.source, PrefetchingSource) else {}
        return _reward_metrics(scores, advantage) | update | counts | seconds | where | data

    def _draw(self, group_ids: list[int]) -> RetakeBatch:
        """The batch of this iteration; the next one is assembled while this one trains."""
        batch = self.source.batch(self.iteration, group_ids)
        if isinstance(self.source, PrefetchingSource) and self.iteration + 1 < self.config.train.iterations:
            self.source.prefetch(self.iteration + 1, group_ids)
        return batch

    def _sampler(self, window: StepWindow) -> FlowSampler:
        """The sampler of one iteration.

        With several updates per rollout, forwards run in batches of one update's members: rollout and learner then have
        equal batch shapes (the ratio stays exactly 1) although every update replays only its own rows.
        """
        config, size, updates = self.config, self.place.member_ids.numel(), self.config.optim.updates_per_rollout
        return FlowSampler(
            build_step_table(config.flow, window),
            size,
            share_prefix=config.levers.share_prefix,
            rows_per_forward=None if updates == 1 else max(config.groups.size // updates, 1),
            window_grad=True,
        )

    def _counts(self, rollout: Rollout, sampler: FlowSampler) -> dict[str, float]:
        """Network passes of this rank that were run, and what the cost model expects of it."""
        levers, table, run = self.config.levers, sampler.table, self.learner.passes
        assert table.window is not None
        walk = Walk(table.window.start, rollout.num_window_steps, table.num_steps - table.window.stop)
        plan = Plan(
            share_prefix=levers.share_prefix,
            merge_first=levers.merge_first_step,
            checkpoint=levers.recompute,
            stream_backward=levers.streaming,
        )
        groups, size = self.place.group_ids.numel(), self.place.member_ids.numel()
        expected = count_passes(walk, groups, size, self.config.optim.updates_per_rollout, plan)
        spent = PassCount(
            rollout.forwards.prefix,
            rollout.forwards.window,
            rollout.forwards.tail,
            run["replay"],
            run["backward"] if levers.recompute else 0,
            run["backward"],
        )
        return {
            "perf/forwards_rollout": float(spent.rollout),
            "perf/forwards_learner": float(spent.replay),
            "perf/forwards_recomputed": float(spent.recompute),
            "perf/backwards": float(spent.backward),
            "perf/forward_equivalents": float(spent.forward_equivalents),
            "perf/predicted_forward_equivalents": float(expected.forward_equivalents),
        }

    def state(self) -> TrainState:
        """Everything a checkpoint holds."""
        learner = self.learner
        return TrainState(
            self.iteration,
            {name: p.detach() for name, p in learner.trained.items()},
            learner.average.state(),
            optimizer_state(learner.optimizer, learner.trained),
            self.notes,
        )

    def load(self, state: TrainState) -> None:
        """Continue from a checkpoint; raises CheckpointError if it does not fit."""
        restore(state, self.learner.trained, self.learner.average.average, self.learner.optimizer)
        self.iteration, self.notes = state.iteration, dict(state.notes)

    def _shuffled(self, values: Tensor) -> Tensor:
        """Permute advantages inside each group by counter-based draws (control experiment)."""
        size = self.config.groups.size
        draws = [
            philox_uniform(size, self.config.run.seed, self.iteration, group, 0, 0, SHUFFLE_STREAM)
            for group in range(len(values) // size)
        ]
        order = torch.stack([torch.as_tensor(draw) for draw in draws]).argsort(1)
        return values.view(-1, size).gather(1, order).flatten()

    def _refuse_too_many_failures(self, scores: Scores) -> None:
        invalid = 1 - float(scores.valid.float().mean())
        if invalid > self.config.failures.max_invalid_fraction:
            causes = ", ".join(f"{name}: {count}" for name, count in scores.failures.items() if count)
            raise RunError(
                f"iteration {self.iteration}: {invalid:.0%} of the samples are invalid ({causes}); the limit is "
                f"failures.max_invalid_fraction={self.config.failures.max_invalid_fraction}. The log names each cause."
            )

    def _refuse_drift(self, drift: float) -> None:
        if not drift <= self.config.train.max_log_prob_diff:
            raise RunError(
                f"iteration {self.iteration}: before any update, log-probabilities of replay and rollout differ by "
                f"{drift:.3g} (bound train.max_log_prob_diff={self.config.train.max_log_prob_diff:.3g}): window and "
                "learner do not run the same artefact (kernels, dtype, batch shape, compiled graph); the "
                "ratio would be wrong"
            )


def _reward_metrics(scores: Scores, advantage: Advantage) -> dict[str, float]:
    valid = scores.valid
    count = valid.sum().clamp_min(1)
    means = {f"reward/{name}": float((value * valid).sum() / count) for name, value in scores.scores.items()}
    means |= {f"reward/{name}": float((value * valid).sum() / count) for name, value in scores.parts.items()}
    means |= {f"reward/{name}": float((value * valid).sum() / count) for name, value in scores.diagnostics.items()}
    means |= {f"advantage/{name}": value for name, value in advantage.metrics.items()}
    means |= {f"failures/{name}": float(number) for name, number in scores.failures.items()}
    means["reward/invalid_fraction"] = 1 - float(valid.float().mean())
    return means
