"""The RL loop. One iteration: conditions, window, rollouts, scores, advantages, update, log, checkpoint.

Shapes in comments: M groups and G' members of each on this rank, R = M * G' its rows, R' those of them that it scores;
N rows of all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import ConfigError, Refusal
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.perf.timer import PhaseTimer, phase
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.rewards.base import Reward
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.turns import decode_and_score
from geoalign.rl.advantage import Advantage, group_advantage
from geoalign.rl.objective import loss_weights
from geoalign.rl.score import Scores, merged
from geoalign.rl.subset import learned_positions, most_informative
from geoalign.rl.window import WindowSchedule
from geoalign.training.checkpoint import TrainState
from geoalign.training.drift import agree_on_drift, profile_file, same_on_all, with_reuse
from geoalign.training.engines.optim import set_learning_rate
from geoalign.training.film import TrainingFilm
from geoalign.training.kept_choice import keep_choice, noted
from geoalign.training.learner import Learner
from geoalign.training.modes import agree_on_modes, refresh_modes, restore_modes
from geoalign.training.processes.ranks import LocalRanks, RankRows, Ranks, gather_scores
from geoalign.training.setup import ready
from geoalign.training.streaming import RowGradients, StreamingBackward
from geoalign.training.tail import EXACT, Auditor, Tail, approximates, keep_exact
from geoalign.training.telemetry import WorkMeter
from geoalign.types import RetakeBatch
from geoalign_kernels import philox_uniform, streams

logger = logging.getLogger(__name__)
SKIPPED = "skipped_iterations"
"""Key of the notes: iterations in a row, up to now, in which every update was skipped."""


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
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.source, self.rewards = config, source, rewards
        self.ranks = LocalRanks() if ranks is None else ranks
        self.schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
        self.rank_rows = RankRows.of(config.groups.conditions, config.groups.size, self.ranks)
        if not self.rank_rows.whole and config.optim.updates_per_rollout > 1:
            raise ConfigError(
                "optim.updates_per_rollout > 1 needs whole groups on every rank: use a number of ranks that divides "
                f"groups.conditions {config.groups.conditions}"
            )
        if not self.rank_rows.whole and config.learn.members is not None:
            raise ConfigError(
                "learn.members needs whole groups on every rank: use a number of ranks that divides "
                f"groups.conditions {config.groups.conditions}"
            )
        if config.learn.short_frames is not None:
            policy.codec.latent_shape(
                config.learn.short_frames, *config.data.video[1:]
            )  # refuses what it cannot encode
        parts = ready(config, policy, self.ranks)
        self.policy, self.engine, self.device = parts.policy, parts.engine, parts.device
        self.learner = Learner(
            policy=self.policy,
            engine=self.engine,
            ranks=self.ranks,
            objective=config.objective,
            updates=config.optim.updates_per_rollout,
            merge_first=config.levers.merge_first_step,
            reference=parts.reference,
        )
        mode = config.levers.streaming
        self._row_gradients = (
            RowGradients(self.engine.trained, self.rank_rows.rows.numel(), mode) if mode in ("device", "host") else None
        )
        self.profile_file = same_on_all(profile_file(config), self.ranks)
        self.auditor = Auditor(config, self.ranks, self.rank_rows, rewards, self.device)
        self.meter = WorkMeter(config, self.rank_rows, self.device)
        self.clock = PhaseTimer(self.device)
        self.iteration = 0
        self.film_wanted = False  # of the next step; a rank that scores nothing makes none
        self.film: TrainingFilm | None = None
        self.notes: dict[str, Any] = noted(config, self.policy.model.execution.core, parts.quantised)

    @property
    def acting(self) -> RetakePolicy:
        """The policy of the rollouts: after a fall back to exact tails without any approximation."""
        return self.policy.exact() if EXACT in self.notes else self.policy

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics.

        Raises:
            Refusal: too many invalid samples, too many iterations without an update, log-probabilities of rollout and
                replay that differ beyond the bound, or an approximate tail that an audit refuses. It holds the metrics
                that are known, and the notes are those before the iteration.
        """
        notes, numbers = dict(self.notes), dict[str, float]()
        try:
            self._step(numbers)
        except Refusal as error:
            self.notes, error.numbers = notes, numbers
            raise
        return numbers

    def _step(self, numbers: dict[str, float]) -> None:
        """One iteration, which adds its metrics to ``numbers`` as they become known."""
        config, rank_rows, self.film = self.config, self.rank_rows, None
        window, began = self.schedule(self.iteration), time.process_time()
        frames = self._frames
        exact = keep_exact(config, self.notes, frames, self.profile_file)
        policy = self.acting
        refresh_modes(policy.fast, config, frames, self.notes)
        sampler = self.sampler(window, frames)
        works = approximates(sampler, policy.fast, config, self.notes)
        audited = self.auditor.due(self.iteration, self.notes, works)
        with self.clock.active():
            with phase("data"):
                batch = self._draw(rank_rows.group_ids.tolist(), frames).to(self.device)
                frames = batch.source.video.shape[1]
            with phase("rollout/encode"):
                precomputed = policy.prepare(batch)
            positions = learned_positions(window.size, config.learn.window_steps, config.run.seed, self.iteration)
            stream = self._stream(sampler, positions)
            self.ranks.check_alive()
            rollout = self._rollout(policy, sampler, batch, precomputed, stream)
            tail = None if audited is None else Tail(audited, rollout.x_next[-1].clone(), rollout.final)
            rollout, usable = rollout.neutralised()  # usable: [R] bool
            scores = self._score(rollout, batch, usable)
            numbers |= {"window/start": float(window.start)} | _score_metrics(scores)
            self._refuse_too_many_failures(scores)
            with phase("advantage"):
                advantage = self._advantage(scores)
            numbers |= {f"advantage/{name}": value for name, value in advantage.metrics.items()}
            numbers |= {"fidelity/exact_tails": float(exact)} if config.approximations() else {}
            spent_on_audit = 0 if tail is None else self._audit(tail, sampler, batch, precomputed, scores, numbers)
            self.ranks.check_alive()
            factor = set_learning_rate(self.engine.optimizer, config.optim, self.iteration, config.train.iterations)
            rows = rank_rows.rows  # [R] among N
            values, valid = advantage.values[rows].to(self.device), scores.valid[rows].to(self.device)  # [R]
            chosen = most_informative(
                advantage.values, scores.valid, scores.lost, config.groups.size, config.learn.members
            )[rows]
            update = self.learner.update(
                sampler, rollout, precomputed, values, valid, self._held(stream), positions=positions, chosen=chosen
            )
        numbers |= update
        self._refuse_drift(update["parity/log_prob_diff_max"])
        self._refuse_standstill(update)
        agree_on_modes(policy.fast, self.ranks, self.notes, longest=window.start == config.window.start)
        agree_on_drift(sampler, self.ranks, self.notes)
        self.iteration += 1
        seconds = self.clock.collect() | {f"time/reward/{name}_s": value for name, value in scores.seconds.items()}
        spent = self.meter.passes(rollout, self.learner.passes, spent_on_audit)
        predicted = self.auditor.passes(audited, sampler)
        numbers |= self._failure_counts()
        numbers |= self.meter.metrics(spent, sampler, positions, predicted, seconds["time/iteration_s"], frames)
        numbers |= {"perf/cpu_s": time.process_time() - began} | seconds | {"optim/lr_factor": factor}
        numbers |= self.source.telemetry() if isinstance(self.source, PrefetchingSource) else {}

    @property
    def _frames(self) -> int:
        """Frames of the videos of this iteration."""
        return self.config.learn.frames(self.iteration, self.config.data.num_frames)

    def _draw(self, group_ids: list[int], frames: int) -> RetakeBatch:
        """The batch of this iteration, of so many frames; the next one is assembled while this one trains."""
        batch = self.source.batch(self.iteration, group_ids)
        if isinstance(self.source, PrefetchingSource) and self.iteration + 1 < self.config.train.iterations:
            self.source.prefetch(self.iteration + 1, group_ids)
        height, width = batch.source.video.shape[-2:]
        return batch.first_frames(frames, self.policy.codec.latent_shape(frames, height, width)[1])

    def sampler(self, window: StepWindow, frames: int) -> FlowSampler:
        """The sampler of one iteration on videos of ``frames``.

        With several updates per rollout, forwards run in batches of at most one update's members: rollout and learner
        then have equal batch shapes (the ratio stays exactly 1) although every update replays only its own rows.
        Unless ``groups.rows_per_forward`` says otherwise, a forward serves one group: its numbers are then the same
        whatever other groups this rank has.
        """
        config, updates = self.config, self.config.optim.updates_per_rollout
        rows = config.groups.rows_per_forward
        groups = 1 if rows is None else None
        if updates > 1:
            rows = rows or max(config.groups.size // updates, 1)
        exact = EXACT in self.notes
        sampler = FlowSampler(
            build_step_table(config.flow.with_exact_tail() if exact else config.flow, window),
            self.rank_rows.member_ids.numel(),
            share_prefix=config.levers.share_prefix,
            rows_per_forward=rows,
            groups_per_forward=groups,
        )
        return sampler if exact else with_reuse(sampler, config, self.notes, self.profile_file, frames)

    def next_sampler(self) -> FlowSampler:
        """The sampler of the next step."""
        return self.sampler(self.schedule(self.iteration), self._frames)

    def _stream(self, sampler: FlowSampler, positions: Sequence[int]) -> StreamingBackward | None:
        if self.config.levers.streaming == "off":
            return None
        weights = loss_weights(sampler.table, self.config.objective).tolist()
        return StreamingBackward(self.engine.trained, weights, self._row_gradients, positions=positions)

    def _held(self, stream: StreamingBackward | None) -> StreamingBackward | None:
        """The stream, unless the backward of some rank's graphs would spread a NaN: then all ranks replay zeros."""
        if stream is None:
            return None
        if self.ranks.maximum(float(stream.poisoned)):
            stream.drop()
            return None
        return stream

    def _rollout(
        self,
        policy: RetakePolicy,
        sampler: FlowSampler,
        batch: RetakeBatch,
        precomputed: Precomputed,
        stream: StreamingBackward | None,
    ) -> Rollout:
        """The rollouts of this rank, as they come."""
        groups, members = (ids.to(self.device) for ids in (self.rank_rows.group_ids, self.rank_rows.member_ids))
        noise = initial_noise(policy.latent_shape(batch), self.config.run.seed, self.iteration, groups)
        return sampler.rollout(
            policy.phased(),
            precomputed,
            noise.to(torch.promote_types(noise.dtype, policy.dtype)),
            seed=self.config.run.seed,
            iteration=self.iteration,
            group_ids=groups,
            member_ids=members,
            observer=stream,
        )

    def _score(self, rollout: Rollout, batch: RetakeBatch, usable: Tensor) -> Scores:
        """Decode and score this rank's videos; scores of all ranks."""
        mine, layout = self.rank_rows.scored.to(self.device), self.config.scoring  # mine: [R'] among R

        def decode(rows: Tensor, conditions: RetakeBatch) -> Tensor:
            with phase("rollout/decode"):
                decoded = self.policy.decode(rollout.final[mine[rows]].float(), conditions.source.video)
            if self.film_wanted and self.film is None:
                self.film = TrainingFilm.of(conditions, decoded)
            return decoded

        with phase("scoring"):  # decoding, and the scorers beside or after it
            scored = decode_and_score(
                self.rewards, decode, batch, mine // self.rank_rows.member_ids.numel(),
                chunk=layout.chunk or self.rank_rows.member_ids.numel(), beside=layout.beside_decode,
            )  # fmt: skip
        if self.film is not None:
            self.film = self.film.with_camera(scored.camera(0))
        return gather_scores(self.ranks, self.rank_rows, merged(scored, usable[mine]))

    def _audit(
        self,
        tail: Tail,
        sampler: FlowSampler,
        batch: RetakeBatch,
        precomputed: Precomputed,
        scores: Scores,
        numbers: dict[str, float],
    ) -> int:
        """Add to ``numbers`` what the exact tail of one group says of the approximate one; the passes spent here."""
        audit = self.auditor.audit(tail, sampler, self.policy, precomputed, batch, scores)
        numbers |= {f"fidelity/{name}": value for name, value in audit.numbers.items()}
        if self.auditor.refuse(audit.bad, self.iteration):
            self.notes[EXACT] = self.iteration  # found under what `keep_exact` noted before the rollouts
        return audit.passes

    def _failure_counts(self) -> dict[str, float]:
        """What the guards of all ranks counted since the start of the process."""
        kinds = ("retries", "timeouts", "errors")
        guards = {name: reward.counts for name, reward in self.rewards.items() if isinstance(reward, GuardedReward)}
        mine = [float(counts.named()[kind]) for counts in guards.values() for kind in kinds]
        names = [f"failures/{name}/{kind}" for name in guards for kind in kinds]
        total = self.ranks.all_reduce(torch.tensor(mine, dtype=torch.float64), "sum") if mine else torch.zeros(0)
        return dict(zip(names, total.tolist(), strict=True))

    def _advantage(self, scores: Scores) -> Advantage:
        """Advantages of all ranks' samples in global order."""
        groups = self.config.groups
        group_ids = torch.arange(groups.conditions).repeat_interleave(groups.size)  # [N]
        advantage = group_advantage(scores.scores, scores.valid, group_ids, self.config.advantage, scores.lost)
        if not self.config.train.shuffle_advantages:
            return advantage
        return Advantage(self._shuffled(advantage.values), advantage.per_key, advantage.metrics)

    def state(self, keep: bool = True) -> TrainState:
        """Everything a checkpoint holds; a collective, of which ranks without ``keep`` get no tensors."""
        return TrainState(self.iteration, self.engine.snapshot(keep), dict(self.notes))

    def load(self, state: TrainState) -> None:
        """Continue from a checkpoint; raises CheckpointError if it does not fit."""
        self.engine.restore(state.snapshot)
        self.iteration = state.iteration
        self.policy = keep_choice(self.policy, self.config, self.device, self.notes, state.notes)
        if keep_exact(self.config, self.notes, self._frames, self.profile_file):
            logger.warning(
                "steps after the window stay exact, because the audit of iteration %d was bad; other approximations or "
                "other bounds of ode.audit_* lift that (--allow-config-change)",
                self.notes[EXACT],
            )
        restore_modes(self.policy.fast, self.notes)

    def _shuffled(self, values: Tensor) -> Tensor:
        """Permute advantages inside each group by counter-based draws (control experiment)."""
        size = self.config.groups.size
        draws = [
            philox_uniform(size, self.config.run.seed, self.iteration, group, 0, 0, streams.SHUFFLE)
            for group in range(len(values) // size)
        ]
        order = torch.stack([torch.as_tensor(draw) for draw in draws]).argsort(1)
        return values.view(-1, size).gather(1, order).flatten()

    def _refuse_too_many_failures(self, scores: Scores) -> None:
        invalid = 1 - float(scores.valid.float().mean())
        if invalid > self.config.failures.max_invalid_fraction:
            causes = ", ".join(f"{name}: {count}" for name, count in scores.failures.items() if count)
            # A scorer may fail because of its machine; latents that are not finite come again, of weights as they are.
            broken = scores.failures.get("policy", 0) > 0
            raise Refusal(
                f"iteration {self.iteration}: {invalid:.0%} of the samples are invalid ({causes}); the limit is "
                f"failures.max_invalid_fraction={self.config.failures.max_invalid_fraction}. The log names each cause, "
                "docs/troubleshooting.md#samples-fail the fix",
                self.iteration,
                clean=not broken,
                repeats=broken,
            )

    def _refuse_drift(self, drift: float) -> None:
        if not drift <= self.config.train.max_log_prob_diff:
            raise Refusal(
                f"iteration {self.iteration}: before any update, log-probabilities of replay and rollout differ by "
                f"{drift:.3g} (bound train.max_log_prob_diff={self.config.train.max_log_prob_diff:.3g}): window and "
                "learner do not run the same artefact (kernels, dtype, batch shape, compiled graph), and the ratio "
                "would be wrong; find the part by run.compile=false run.attention=sdpa_flash levers.streaming=off "
                "(docs/troubleshooting.md#the-ratio-is-not-1)",
                self.iteration,
            )

    def _refuse_standstill(self, update: Mapping[str, float]) -> None:
        earlier = self.notes.pop(SKIPPED, 0)
        if update["policy/skipped_updates"] < self.config.optim.updates_per_rollout:
            return
        count = self.notes[SKIPPED] = earlier + 1
        if count >= self.config.failures.max_skipped_updates:
            raise Refusal(
                f"iteration {self.iteration}: every update of the last {count} iterations was skipped "
                f"(failures.max_skipped_updates={count}), because the gradient is not finite (norm "
                f"{update['policy/grad_norm']:g}); {_broken_weights(self.engine.trained)}",
                self.iteration,
            )


def _broken_weights(trained: Mapping[str, torch.nn.Parameter]) -> str:
    local = {name: getattr(value.detach(), "to_local", value.detach)() for name, value in trained.items()}
    broken = [name for name, value in local.items() if not bool(torch.isfinite(value).all())]
    if not broken:
        told = "the trained weights are finite: the backward overflows"
        return f"{told}, try run.dtype=float32 (--resume auto --allow-config-change)"
    return (
        f"{len(broken)} of {len(local)} trained weights are not finite, the first is {broken[0]}: resume from a "
        "checkpoint before with a smaller optim.lr, or start from another train.base "
        "(docs/troubleshooting.md#nan-and-skipped-updates)"
    )


def _score_metrics(scores: Scores) -> dict[str, float]:
    valid, read = scores.valid, scores.valid & ~scores.lost
    means = {f"reward/{name}": _mean_of_defined(value, read) for name, value in scores.scores.items()}
    others = {**scores.parts, **scores.diagnostics, "lost_fraction": scores.lost.double()}
    means |= {f"reward/{name}": _mean_of_defined(value, valid) for name, value in others.items()}
    means |= {f"failures/{name}": float(number) for name, number in scores.failures.items()}
    means["reward/invalid_fraction"] = 1 - float(valid.float().mean())
    return means


def _mean_of_defined(value: Tensor, valid: Tensor) -> float:
    """Mean over valid samples where the value is defined; NaN without any.

    A path that stands still has no scale, and a lost camera no errors.
    """
    counted = valid & ~torch.isnan(value)
    return float(torch.where(counted, value, 0).sum() / counted.sum())
