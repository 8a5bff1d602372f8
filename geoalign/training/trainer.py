"""The RL loop. One iteration: conditions, window, rollouts, scores, advantages, update, log, checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import RunError
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.perf.timer import PhaseTimer
from geoalign.rewards.base import Reward
from geoalign.rl.advantage import Advantage, group_advantage
from geoalign.rl.policy import RetakePolicy
from geoalign.rl.score import Scores, score_videos
from geoalign.rl.window import WindowSchedule
from geoalign.training.checkpoint import TrainState, optimizer_state, restore
from geoalign.training.learner import Learner
from geoalign.training.optim import MovingAverage, build_adamw, freeze_all_but, set_learning_rate
from geoalign.types import RetakeBatch
from geoalign_kernels import philox_uniform

logger = logging.getLogger(__name__)
SHUFFLE_STREAM = 6


class ConditionSource(Protocol):
    """Conditions as a pure function of (seed, iteration, group id)."""

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        """The conditions of these groups."""
        ...


class Trainer:
    """Runs iterations; holds everything that a checkpoint restores."""

    def __init__(
        self, config: Config, policy: RetakePolicy, source: ConditionSource, rewards: Mapping[str, Reward]
    ) -> None:
        self.config, self.policy, self.source, self.rewards = config, policy, source, rewards
        self.schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
        trained = freeze_all_but(policy.model, config.optim.trainable)
        self.learner = Learner(
            policy,
            trained,
            build_adamw(trained, config.optim),
            MovingAverage(trained, config.optim.ema),
            config.objective,
            config.optim,
        )
        self.iteration = 0
        self.notes: dict[str, Any] = {}

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics.

        Raises:
            RunError: too many invalid samples, or log-probabilities of rollout and replay differ beyond the bound.
        """
        config, clock = self.config, PhaseTimer()
        groups = torch.arange(config.groups.conditions)
        window = self.schedule(self.iteration)
        sampler = FlowSampler(build_step_table(config.flow, window), config.groups.size, window_grad=True)
        with clock.phase("data"):
            batch = self.source.batch(self.iteration, groups.tolist())
        with clock.phase("rollout/encode"), torch.no_grad():
            conditioning = self.policy.condition(batch)
            prepared = self.policy.prepare(conditioning)
        with clock.phase("rollout/denoise"):
            noise = initial_noise(self.policy.latent_shape(batch), config.run.seed, self.iteration, groups)
            rollout, usable = sampler.rollout(
                self.policy.velocity, prepared, noise, seed=config.run.seed, iteration=self.iteration, group_ids=groups
            ).neutralised()
        with clock.phase("rollout/decode"):
            members = batch.repeat_interleave(config.groups.size)
            videos = self.policy.decode(rollout.final, members)
        with clock.phase("reward"):
            scores = score_videos(self.rewards, videos, members, usable)
            self._refuse_too_many_failures(scores)
        with clock.phase("advantage"):
            group_ids = groups.repeat_interleave(config.groups.size)
            advantage = group_advantage(scores.scores, scores.valid, group_ids, config.advantage)
            values = self._shuffled(advantage.values) if config.train.shuffle_advantages else advantage.values
        with clock.phase("update"):
            factor = set_learning_rate(self.learner.optimizer, config.optim, self.iteration, config.train.iterations)
            update = self.learner.update(sampler, rollout, conditioning, values, scores.valid)
        self._refuse_drift(update["parity/log_prob_diff_max"])
        self.iteration += 1
        forwards = {
            "perf/forwards_rollout": float(rollout.forwards.total),
            "perf/forwards_learner": float(sum(rollout.state(k).shape[0] for k in range(rollout.num_window_steps))),
        }
        seconds = clock.collect() | {f"time/reward/{name}_s": value for name, value in scores.seconds.items()}
        place = {"window/start": float(window.start), "optim/lr_factor": factor}
        return _reward_metrics(scores, advantage) | update | forwards | seconds | place

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
                "learner do not run the same artefact (kernels, dtype, batch shape, compiled graph)"
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
