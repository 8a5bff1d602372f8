"""The update: replay the window, weigh by advantages, step the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geoalign.config.flow import ObjectiveConfig
from geoalign.config.training import OptimConfig
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.models.conditioning import Conditioning
from geoalign.rl.objective import RatioStats, clipped_surrogate, loss_weights
from geoalign.rl.policy import RetakePolicy
from geoalign.training.optim import MovingAverage


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
    """

    policy: RetakePolicy
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage
    objective: ObjectiveConfig
    optim: OptimConfig

    def update(
        self, sampler: FlowSampler, rollout: Rollout, conditioning: Conditioning, advantage: Tensor, valid: Tensor
    ) -> dict[str, float]:
        """Take the configured optimizer updates from one rollout (eq. 7).

        The first window step runs once per condition and serves all members (merged first learner step).

        Args:
            sampler: made the rollout.
            rollout: R = M * G trajectories, finite (``Rollout.neutralised``).
            conditioning: its M conditions.
            advantage: ``[R]``.
            valid: ``[R]`` bool.

        Returns:
            Metrics: ratio statistics of all updates, loss, gradient norm, and log-probability parity before the first.
        """
        stats: RatioStats | None = None
        numbers: dict[str, float] = {"parity/log_prob_diff_max": 0.0}
        updates = self.optim.updates_per_rollout
        member = torch.arange(rollout.num_rows) % rollout.group_size
        for part in range(updates):
            keep = valid & (member * updates // rollout.group_size == part)
            self.optimizer.zero_grad(set_to_none=True)
            loss, part_stats, drift = self._accumulate(sampler, rollout, conditioning, advantage, keep, valid)
            norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.optim.grad_clip)
            if bool(torch.isfinite(norm)):
                self.optimizer.step()
                self.average.update()
            if part == 0:
                numbers["parity/log_prob_diff_max"] = drift
            stats = part_stats if stats is None else stats + part_stats
            numbers |= {"policy/loss": loss, "policy/grad_norm": float(norm)}
            numbers["policy/skipped_updates"] = numbers.get("policy/skipped_updates", 0.0) + float(
                not torch.isfinite(norm)
            )
        assert stats is not None
        return numbers | {f"policy/{name}": value for name, value in stats.summary().items()}

    def _accumulate(
        self,
        sampler: FlowSampler,
        rollout: Rollout,
        conditioning: Conditioning,
        advantage: Tensor,
        keep: Tensor,
        valid: Tensor,
    ) -> tuple[float, RatioStats, float]:
        """Sum gradients over the window; returns the loss, ratio statistics and largest log-probability drift.

        ``keep`` are the rows of this update, ``valid`` all rows whose rollout can be trusted.
        """
        weights = loss_weights(sampler.table, self.objective)
        denominator = max(float(keep.sum()) * rollout.num_window_steps, 1.0)
        loss, drift = 0.0, torch.zeros(())
        stats: RatioStats | None = None
        for position in range(rollout.num_window_steps):
            for rows in sampler.replay_batches(rollout, position):
                prepared = self.policy.prepare(conditioning)  # with graph: camera gains live in it
                replayed = sampler.replay(self.policy.velocity, rollout, position, prepared, rows).log_prob
                old = rollout.log_prob[rows, position]
                # Rows that failed carry zeros instead of states; a NaN of a valid row must not be lost in a maximum.
                difference = torch.where(valid[rows], replayed.detach() - old, 0.0).abs()
                drift = torch.maximum(drift, difference.max())
                output = clipped_surrogate(
                    replayed,
                    old,
                    advantage[rows],
                    clip=self.objective.clip,
                    weight=float(weights[position]),
                    denominator=denominator,
                    valid=keep[rows],
                )
                output.loss.backward()
                loss += float(output.loss.detach())
                stats = output.stats if stats is None else stats + output.stats
        assert stats is not None
        return loss, stats, float(drift)
