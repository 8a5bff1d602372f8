"""The update: replay the window, weigh by advantages, step the optimizer.

Shapes in comments, as in ``flow/sampler.py``: M conditions, G members of each, R = M * G rows, K window steps; a slice
of rows stands for its length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geoalign.config.flow import ObjectiveConfig
from geoalign.flow.policy import Velocity
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.perf.timer import phase
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.rl.objective import LossOutput, RatioStats, clipped_surrogate, kl_loss, loss_weights, reference_kl
from geoalign.training.engines.base import Engine
from geoalign.training.processes.ranks import Ranks
from geoalign.training.reference import ReferencePolicy
from geoalign.training.streaming import StreamingBackward
from geoalign_kernels import exact_only


@dataclass(slots=True, kw_only=True)
class Learner:
    """Turns rollouts and advantages into updates of an engine.

    Attributes:
        policy: the very policy that the rollout used.
        engine: owns the trained parameters and their optimizer.
        ranks: joins numbers of the ranks.
        objective: clip range, time weights, weight of the KL term.
        updates: optimizer updates per rollout; the group's members are split into that many parts.
        merge_first: one forward and backward per condition at the first window step, instead of one per member.
        reference: the policy that a KL term pulls towards, or None.
        passes: network passes of the last update by kind (``replay``, ``backward``, ``reference``), per sample.
    """

    policy: RetakePolicy
    engine: Engine
    ranks: Ranks
    objective: ObjectiveConfig
    updates: int = 1
    merge_first: bool = True
    reference: ReferencePolicy | None = None
    passes: Counter[str] = field(default_factory=Counter)

    def update(
        self,
        sampler: FlowSampler,
        rollout: Rollout,
        precomputed: Precomputed,
        advantage: Tensor,
        valid: Tensor,
        stream: StreamingBackward | None = None,
        *,
        positions: Sequence[int] | None = None,
        chosen: Tensor | None = None,
    ) -> dict[str, float]:
        """Take the configured optimizer updates from one rollout (eq. 7).

        Args:
            sampler: made the rollout.
            rollout: R = M * G trajectories, finite (``Rollout.neutralised``).
            precomputed: its M conditions.
            advantage: ``[R]``.
            valid: ``[R]`` bool.
            stream: the rollout's own backward; only what it left is replayed.
            positions: the window positions that are learned from, drawn at random; None: all. The loss is divided by
                their number, so that its expectation is that over all.
            chosen: ``[R]`` bool on the host, the rows that are learned from; None: all. Nothing is rescaled.

        Returns:
            Metrics: ratio statistics of all updates, loss, gradient norm, and log-probability parity before the first.
        """
        self.passes.clear()
        stats = RatioStats.empty(advantage.device)
        numbers: dict[str, float] = {"policy/skipped_updates": 0.0}
        positions = range(rollout.num_window_steps) if positions is None else positions
        part_of_row = torch.arange(rollout.num_rows) % rollout.group_size * self.updates // rollout.group_size  # [R]
        for part in range(self.updates):
            mine = part_of_row == part  # [R]
            count = self.ranks.sum(float((valid & mine.to(valid.device)).sum())) * len(positions)
            mine = mine if chosen is None else mine & chosen
            keep = valid & mine.to(valid.device)  # [R]
            share = _Share(advantage, keep, valid, mine, max(count, 1.0), self.objective)
            self.engine.begin()
            with exact_only():  # forwards, and what backwards compute again
                if stream is None:
                    result = self._replay(sampler, rollout, precomputed, share, positions)
                else:
                    result = self._replay(sampler, rollout, precomputed, share, sorted(stream.left))
                    self._stream(sampler, stream, rollout, share, result)
            with phase("update/optimizer"):
                norm = self.engine.step()
            if part == 0:
                numbers["parity/log_prob_diff_max"] = self.ranks.maximum(float(result.drift))
            stats = stats + self.ranks.join(result.stats)
            numbers |= {"policy/loss": self.ranks.sum(float(result.loss)), "policy/grad_norm": norm}
            numbers["policy/skipped_updates"] += float(not math.isfinite(norm))
            if self.reference is not None:
                numbers["policy/reference_kl"] = self.ranks.sum(float(result.kl)) / max(count, 1.0)
        return numbers | {f"policy/{name}": value for name, value in stats.summary().items()}

    def _replay(
        self, sampler: FlowSampler, rollout: Rollout, precomputed: Precomputed, share: _Share, positions: Sequence[int]
    ) -> _Result:
        """Sum gradients over some window steps.

        The first window step runs once per condition and serves all members (merged first learner step); the others
        run the rows of this update only.
        """
        weights = loss_weights(sampler.table, self.objective).tolist()  # [K]
        if not self.merge_first and rollout.shared:
            rollout = replace(rollout, x_start=rollout.x_start.repeat_interleave(rollout.group_size, 0))
        result = _Result.zero(share.advantage.device)
        targets = self._reference_velocities(sampler, rollout, precomputed, share, positions)
        for position, rows, forwards in self._batches(sampler, rollout, share, positions):
            with phase("update/forward"):
                replayed = sampler.replay(self.policy.velocity, rollout, position, precomputed, rows)
                old = rollout.log_prob[rows, position]  # [rows]
                output = share.surrogate(replayed.log_prob, old, rows, weights[position])
                loss = output.loss
                if targets is not None:
                    term, kl = share.kl(replayed.velocity, next(targets), sampler, position, rows, weights[position])
                    loss, result.kl = loss + term, result.kl + kl
            with phase("update/backward"):
                self.engine.backward(loss)
            self.passes.update(replay=forwards * replayed.velocity.passes, backward=forwards * replayed.velocity.passes)
            result.add(loss, output, share.drift(replayed.log_prob, old, rows))
        return result

    def _batches(
        self, sampler: FlowSampler, rollout: Rollout, share: _Share, positions: Sequence[int]
    ) -> Iterator[tuple[int, slice, int]]:
        """(window position, rows, forwards) of the batches that hold rows of this update."""
        for position in positions:
            per_lane = rollout.num_rows // rollout.state(position).shape[0]  # G at a shared start, else 1
            for rows in sampler.replay_batches(rollout, position):
                if bool(share.mine[rows].any()):
                    yield position, rows, (rows.stop - rows.start) // per_lane

    def _reference_velocities(
        self, sampler: FlowSampler, rollout: Rollout, precomputed: Precomputed, share: _Share, positions: Sequence[int]
    ) -> Iterator[Velocity] | None:
        """The reference's velocities of every batch, in order; None without a KL term.

        They are computed before the update's own forwards, so that the reference is put in place once per update.
        """
        if self.reference is None:
            return None
        velocities = []
        with phase("update/reference"), torch.no_grad(), self.reference.in_place():
            fixed = self.policy.precompute(precomputed.conditioning)
            for position, rows, forwards in self._batches(sampler, rollout, share, positions):
                velocity = sampler.replay(self.policy.velocity, rollout, position, fixed, rows).velocity
                self.passes.update(reference=forwards * velocity.passes)
                velocities.append(velocity)
        return iter(velocities)

    def _stream(
        self, sampler: FlowSampler, stream: StreamingBackward, rollout: Rollout, share: _Share, result: _Result
    ) -> None:
        """Add the backward that the rollout left behind; its log-probabilities are old and new at once."""
        weights = loss_weights(sampler.table, self.objective).tolist()  # [K]
        total = torch.zeros((), device=share.advantage.device)
        with phase("update/backward"):
            for position, rows, log_prob, passes in (*stream.graphs, *stream.done):  # log_prob: [rows]
                output = share.surrogate(log_prob, log_prob.detach(), rows, weights[position])
                if log_prob.requires_grad:
                    total = total + output.loss
                result.add(output.loss, output, share.drift(log_prob, rollout.log_prob[rows, position], rows))
                self.passes.update(backward=passes)
            if total.requires_grad:
                self.engine.backward(total)
            if stream.gradients is not None:
                self.engine.accumulate(stream.gradients.combine(-share.gain / share.denominator))
        stream.drop()


@dataclass(frozen=True, slots=True)
class _Share:
    """What one optimizer update takes of a rollout, per row: ``keep`` = ``valid`` and ``mine``; that is on the host."""

    advantage: Tensor  # [R]
    keep: Tensor  # [R]
    valid: Tensor  # [R]
    mine: Tensor  # [R]
    denominator: float
    objective: ObjectiveConfig

    @property
    def gain(self) -> Tensor:
        """``[R]`` advantages, 0 for rows that this update leaves out."""
        return torch.where(self.keep, self.advantage, 0.0)

    def surrogate(self, log_prob: Tensor, old: Tensor, rows: slice, weight: float) -> LossOutput:
        """The clipped surrogate of some rows of a window step."""
        return clipped_surrogate(
            log_prob,
            old,
            self.advantage[rows],
            clip=self.objective.clip,
            weight=weight,
            denominator=self.denominator,
            valid=self.keep[rows],
        )

    def drift(self, log_prob: Tensor, old: Tensor, rows: slice) -> Tensor:
        """Largest difference of new and old among valid rows; those that failed carry zeros instead of states."""
        return torch.where(self.valid[rows], log_prob.detach() - old, 0.0).abs().max().float()

    def kl(
        self, velocity: Velocity, reference: Velocity, sampler: FlowSampler, position: int, rows: slice, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The KL term of some rows of a window step, and the unweighted sum of their divergences."""
        assert sampler.table.window is not None
        coefficients = sampler.table.row(sampler.table.window.steps[position])
        kl = reference_kl(velocity.combined(), reference.combined(), coefficients)  # [rows]
        settings = {"kl_weight": self.objective.kl_weight, "weight": weight, "denominator": self.denominator}
        keep = self.keep[rows]
        return kl_loss(kl, **settings, valid=keep), torch.where(keep, kl.detach(), 0.0).sum()


@dataclass(slots=True)
class _Result:
    """Sums over the batches of one update; tensors, so that nothing waits for the device."""

    loss: Tensor
    kl: Tensor
    drift: Tensor
    stats: RatioStats

    @staticmethod
    def zero(device: torch.device) -> _Result:
        """Nothing yet."""
        zero = torch.zeros((), device=device)
        return _Result(zero.double(), zero.double(), zero, RatioStats.empty(device))

    def add(self, loss: Tensor, output: LossOutput, drift: Tensor) -> None:
        """Add one batch; a drift that is NaN stays."""
        self.loss, self.stats = self.loss + loss.detach(), self.stats + output.stats
        self.drift = torch.maximum(self.drift, drift)
