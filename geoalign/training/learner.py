"""The update: replay the window, weigh by advantages, step the optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from geoalign.config.flow import ObjectiveConfig
from geoalign.config.training import OptimConfig
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.models.conditioning import Conditioning
from geoalign.rl.objective import LossOutput, RatioStats, clipped_surrogate, loss_weights
from geoalign.rl.policy import RetakePolicy
from geoalign.training.engine import Engine, LocalEngine
from geoalign.training.optim import MovingAverage
from geoalign.training.streaming import StreamingBackward


@dataclass(slots=True)
class Learner:
    """Owns the trained parameters, their optimizer and their average.

    Attributes:
        policy: the very policy that the rollout used.
        trained: trained parameters by name.
        optimizer: AdamW over them.
        average: their moving average.
        objective: clip range and time weights.
        optim: gradient clip and updates per rollout.
        merge_first: one forward and backward per condition at the first window step, instead of one per member.
        engine: joins the ranks.
        passes: network passes of the last update by kind (``replay``, ``backward``), per sample.
    """

    policy: RetakePolicy
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage
    objective: ObjectiveConfig
    optim: OptimConfig
    merge_first: bool = True
    engine: Engine = field(default_factory=LocalEngine)
    passes: Counter[str] = field(default_factory=Counter)

    def update(
        self,
        sampler: FlowSampler,
        rollout: Rollout,
        conditioning: Conditioning,
        advantage: Tensor,
        valid: Tensor,
        stream: StreamingBackward | None = None,
    ) -> dict[str, float]:
        """Take the configured optimizer updates from one rollout (eq. 7).

        Args:
            sampler: made the rollout.
            rollout: R = M * G trajectories, finite (``Rollout.neutralised``).
            conditioning: its M conditions.
            advantage: ``[R]``.
            valid: ``[R]`` bool.
            stream: the rollout's own graphs; the backward starts from them and nothing is replayed.

        Returns:
            Metrics: ratio statistics of all updates, loss, gradient norm, and log-probability parity before the first.
        """
        self.passes.clear()
        stats: RatioStats | None = None
        numbers: dict[str, float] = {"parity/log_prob_diff_max": 0.0}
        updates = self.optim.updates_per_rollout
        part_of_row = torch.arange(rollout.num_rows) % rollout.group_size * updates // rollout.group_size
        for part in range(updates):
            self.optimizer.zero_grad(set_to_none=True)
            mine = part_of_row == part
            denominator = self.engine.sum(float((valid & mine).sum())) * rollout.num_window_steps
            share = _Share(advantage, valid & mine, valid, mine, max(denominator, 1.0))
            if stream is not None:
                loss, part_stats = self._stream(sampler, stream, rollout, share)
                drift = 0.0
            else:
                loss, part_stats, drift = self._replay(sampler, rollout, conditioning, share)
            self.engine.reduce_gradients(self.trained)
            norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.optim.grad_clip)
            if bool(torch.isfinite(norm)):  # the norm is that of the reduced gradient, hence equal on all ranks
                self.optimizer.step()
                self.average.update()
            if part == 0:
                numbers["parity/log_prob_diff_max"] = self.engine.maximum(drift)
            part_stats = self.engine.join(part_stats)
            stats = part_stats if stats is None else stats + part_stats
            numbers |= {"policy/loss": self.engine.sum(loss), "policy/grad_norm": float(norm)}
            numbers["policy/skipped_updates"] = numbers.get("policy/skipped_updates", 0.0) + float(
                not torch.isfinite(norm)
            )
        assert stats is not None
        return numbers | {f"policy/{name}": value for name, value in stats.summary().items()}

    def _replay(
        self, sampler: FlowSampler, rollout: Rollout, conditioning: Conditioning, share: _Share
    ) -> tuple[float, RatioStats, float]:
        """Sum gradients over the window; returns the loss, ratio statistics and largest log-probability drift.

        The first window step runs once per condition and serves all members (merged first learner step); the others
        run the rows of this update only.
        """
        weights = loss_weights(sampler.table, self.objective)
        if not self.merge_first and rollout.shared:
            rollout = replace(rollout, x_start=rollout.x_start.repeat_interleave(rollout.group_size, 0))
        loss, drift = 0.0, torch.zeros(())
        stats: RatioStats | None = None
        for position in range(rollout.num_window_steps):
            per_lane = rollout.num_rows // rollout.state(position).shape[0]
            for rows in sampler.replay_batches(rollout, position):
                if not bool(share.mine[rows].any()):
                    continue
                prepared = self.policy.prepare(conditioning)  # with graph: camera gains live in it
                replayed = sampler.replay(self.policy.velocity, rollout, position, prepared, rows).log_prob
                old = rollout.log_prob[rows, position]
                # Rows that failed carry zeros instead of states; a NaN of a valid row must not be lost in a maximum.
                difference = torch.where(share.valid[rows], replayed.detach() - old, 0.0).abs()
                drift = torch.maximum(drift, difference.max().float())
                output = share.surrogate(replayed, old, rows, self.objective.clip, float(weights[position]))
                output.loss.backward()
                self.passes.update(replay=(rows.stop - rows.start) // per_lane)
                self.passes.update(backward=(rows.stop - rows.start) // per_lane)
                loss += float(output.loss.detach())
                stats = output.stats if stats is None else stats + output.stats
        assert stats is not None
        return loss, stats, float(drift)

    def _stream(
        self, sampler: FlowSampler, stream: StreamingBackward, rollout: Rollout, share: _Share
    ) -> tuple[float, RatioStats]:
        """One backward from the graphs that the rollout left behind; the ratio is 1, so old and new are one tensor."""
        weights = loss_weights(sampler.table, self.objective)
        total, stats = torch.zeros((), dtype=rollout.log_prob.dtype), None
        for position, rows, log_prob in stream.drain():
            old = log_prob.detach()
            output = share.surrogate(log_prob, old, rows, self.objective.clip, float(weights[position]))
            total = total + output.loss
            stats = output.stats if stats is None else stats + output.stats
            shared = position == 0 and rollout.shared
            self.passes.update(backward=(rows.stop - rows.start) // (rollout.group_size if shared else 1))
        assert stats is not None
        total.backward()
        return float(total.detach()), stats


@dataclass(frozen=True, slots=True)
class _Share:
    """What one optimizer update takes of a rollout, per row: ``keep`` = ``valid`` and ``mine``."""

    advantage: Tensor
    keep: Tensor
    valid: Tensor
    mine: Tensor
    denominator: float

    def surrogate(self, log_prob: Tensor, old: Tensor, rows: slice, clip: float, weight: float) -> LossOutput:
        """The clipped surrogate of some rows of a window step."""
        return clipped_surrogate(
            log_prob,
            old,
            self.advantage[rows],
            clip=clip,
            weight=weight,
            denominator=self.denominator,
            valid=self.keep[rows],
        )
