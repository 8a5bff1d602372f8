"""``FlowSampler``: group rollouts with a shared deterministic prefix, their replay in the learner, and plain sampling.

All G members of a group share condition and initial noise, so the steps before the window and the first window forward
have one result per group. They are computed once; the members part at the noise of the first stochastic step. "Window"
means the stochastic steps: usually consecutive, else any set, with deterministic steps of the tail policy between them.

Shapes in comments: M conditions (groups), G members of each, R = M * G rows, row i being member i % G of condition
i // G; K window steps; L lanes, the states that the prefix computes: M of them if it is shared, else R. A slice stands
for its length: x[lanes] is [lanes, ...]; ... are the axes of one latent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.flow.policy import Condition, PhasedPolicy, Velocity, VelocityFn
from geoalign.flow.reuse import DriftMeter, TailSource
from geoalign.flow.rollout import ForwardCount, Rollout
from geoalign.flow.rows import condition_of, repeat, split, working
from geoalign.flow.steps import Steps
from geoalign.flow.table import StepTable
from geoalign.perf.timer import phase
from geoalign_kernels import NoiseKey, exact_only, philox_normal, streams


class ObservedStep(NamedTuple):
    """One window forward of a rollout, as an observer gets it."""

    position: int
    """Of the window step, 0..K-1."""
    rows: slice
    """All rows that the forward served."""
    log_prob: Tensor
    """[rows], with the graph of the rollout's own forward."""
    passes: int
    """Network passes of that forward, summed over its samples."""


WindowObserver = Callable[[ObservedStep], None]


class ReplayStep(NamedTuple):
    """A window step recomputed by the learner."""

    log_prob: Tensor
    """[n] of the n replayed rows, with graph."""
    velocity: Velocity
    """With graph, of the n replayed rows (repeated where one forward served several)."""


def initial_noise(
    shape: Sequence[int],
    seed: int,
    iteration: int,
    group_ids: Tensor,
    *,
    sample: Tensor | int = 0,
    stream: int = streams.INITIAL_NOISE,
) -> Tensor:
    """Standard normal latents [len(group_ids), *shape] float32, a function of the counters only.

    ``sample`` 0 is the noise that a group shares; other streams serve evaluation.
    """
    return philox_normal(shape, NoiseKey(seed, iteration, group_ids, sample, 0, stream), device=group_ids.device)


@dataclass(slots=True)
class _RolloutCall:
    """One call of ``rollout``: who acts, what names the noise, and the buffers that are filled."""

    phases: PhasedPolicy
    observer: WindowObserver | None
    seed: int
    iteration: int
    groups: Tensor  # [R] ids
    members: Tensor  # [R] ids
    x_start: Tensor  # [L, ...]
    x_next: Tensor  # [K, R, ...]
    log_prob: Tensor  # [R, K]
    final: Tensor  # [R, ...]
    entered: dict[int, Tensor]  # of positions after a gap: [R, ...]
    forwards: Counter[str] = field(default_factory=Counter)

    @property
    def rows_per_lane(self) -> int:
        """Rows that one state of the prefix stands for: G if the prefix is shared, else 1."""
        return self.final.shape[0] // self.x_start.shape[0]


@dataclass(frozen=True, slots=True)
class FlowSampler:
    """Walks one step table; holds no state between calls.

    Args:
        table: steps of the trajectory.
        group_size: G, members per condition.
        share_prefix: compute what the members have in common once per condition. False runs everything per member and
            gives the same numbers (the exactness test).
        rows_per_forward: largest batch of one network forward; None: all rows at once. Part of the artefact that
            rollout and learner must share, because kernels round differently at other batch shapes.
        groups_per_forward: most groups that one network forward serves; None: as many as there are. With 1 a group's
            numbers do not depend on which other groups are here.
        window_grad: run window forwards with gradients enabled, whatever the caller's mode, as the learner's replay
            runs them: compiled graphs and recomputed blocks differ between the modes, and round apart. False saves the
            activations of one forward where nothing is replayed.
        reused: steps after the window that are not evaluated (:func:`geoalign.flow.reuse.reused_steps`).
        drift: measures, in a tail that is evaluated, how far reuse would be off.
    """

    table: StepTable
    group_size: int = 1
    share_prefix: bool = True
    rows_per_forward: int | None = None
    groups_per_forward: int | None = None
    window_grad: bool = True
    reused: frozenset[int] = frozenset()
    drift: DriftMeter | None = None

    def rollout(
        self,
        policy: VelocityFn | PhasedPolicy,
        cond: Condition,
        x_init: Tensor,
        *,
        seed: int,
        iteration: int,
        group_ids: Tensor,
        member_ids: Tensor | None = None,
        observer: WindowObserver | None = None,
    ) -> Rollout:
        """Sample G trajectories for each of M conditions.

        Args:
            policy: velocity function, or one per phase.
            cond: M conditions.
            x_init: [M, ...] initial noise shared in each group; without ``share_prefix`` also [M * G, ...].
            seed, iteration: name the noise together with the ids.
            group_ids: [M] int64, unique in the iteration over all ranks.
            member_ids: [G] int64, unique in the group; default 0..G-1. Lets several ranks share a group.
            observer: called after every window step with log-probabilities that still carry the graph of the forward
                (streaming backward); it decides how long the graph lives.

        Raises:
            UsageError: the table has no window, batch sizes do not fit, steps are reused of a policy that cannot, or
                inference mode is on although the window is to be replayed.
        """
        run = self._begin(PhasedPolicy.of(policy), observer, x_init, seed, iteration, group_ids, member_ids)
        conditions, size = group_ids.numel(), self.group_size
        x_init = repeat(working(x_init), run.x_start.shape[0] // x_init.shape[0])  # [L, ...]
        for lanes in self._lane_batches(run.x_start.shape[0], conditions):
            lane_cond = condition_of(cond, lanes, size // run.rows_per_lane, conditions)
            rows, x, m_prev = self._prefix_and_branch(run, lane_cond, x_init[lanes], lanes)  # x: [rows, ...]
            for part in split(rows.start, rows.stop, self.rows_per_forward):
                local = slice(part.start - rows.start, part.stop - rows.start)
                history = None if m_prev is None else m_prev[local]
                self._finish(run, condition_of(cond, part, size, conditions), x[local], history, part)
        counts = ForwardCount(*(run.forwards[name] for name in ("prefix", "window", "tail", "reused")))
        stored = run.x_start, run.x_next, run.log_prob, run.final
        return Rollout(*stored, self.table, self.group_size, counts, run.entered)

    def replay(
        self,
        policy: VelocityFn | PhasedPolicy,
        rollout: Rollout,
        position: int,
        cond: Condition,
        rows: slice | None = None,
    ) -> ReplayStep:
        """Log-probabilities of window step ``position`` (0..K-1) under the current policy, from the stored states.

        The same functions in the same order as in the rollout, hence equal bit for bit while the policy is unchanged
        and the batches are those of ``replay_batches``. Where the state is shared, the policy runs once per condition
        and its velocity serves all replayed members (merged first learner step).

        Args:
            policy: its ``window`` function is used; the caller chooses the gradient mode.
            rollout: made by a sampler of the same table.
            position: window position.
            cond: the M conditions of the rollout.
            rows: the rows to replay, default all.
        """
        rows = slice(0, rollout.num_rows) if rows is None else rows
        step = self._window_steps[position]
        state = rollout.state(position)  # [L, ...] with L = M at a shared start, else R
        per_lane = rollout.num_rows // state.shape[0]
        lanes = slice(rows.start // per_lane, -(-rows.stop // per_lane))
        num_conditions = rollout.num_rows // rollout.group_size
        lane_cond = condition_of(cond, lanes, rollout.group_size // per_lane, num_conditions)
        window = PhasedPolicy.of(policy).window
        with exact_only():
            velocity = self._steps.velocity(window, state[lanes], step, lane_cond)  # [lanes, ...]
        offset = rows.start - lanes.start * per_lane
        members = slice(offset, offset + rows.stop - rows.start)
        v = velocity.map(lambda part: repeat(working(part), per_lane)[members])  # [rows, ...]
        x = repeat(working(state[lanes]), per_lane)[members]  # [rows, ...]
        return ReplayStep(self._steps.log_prob(x, v, rollout.x_next[position][rows], step), v)

    def replay_batches(self, rollout: Rollout, position: int) -> list[slice]:
        """The row batches whose forwards have the shapes that the rollout had."""
        num_lanes = rollout.state(position).shape[0]
        per_lane = rollout.num_rows // num_lanes
        lanes = self._lane_batches(num_lanes, rollout.num_rows // rollout.group_size)
        return [slice(lane.start * per_lane, lane.stop * per_lane) for lane in lanes]

    @torch.no_grad()
    def sample(self, policy: VelocityFn | PhasedPolicy, cond: Condition, x_init: Tensor) -> Tensor:
        """Deterministic sampling of a table without window, one trajectory per condition: latents [M, ...] at sigma 0.

        Uses the policy's ``tail`` function.

        Raises:
            UsageError: the table has a stochastic window.
        """
        if self.table.window is not None:
            raise UsageError("FlowSampler.sample needs a table without window; use rollout for stochastic steps")
        tail, steps, batch = PhasedPolicy.of(policy).tail, range(self.table.num_steps), x_init.shape[0]
        parts = []
        for rows in split(0, batch, self.rows_per_forward):
            part_cond = condition_of(cond, rows, 1, batch)
            x, _ = self._steps.walk(tail, working(x_init[rows]), None, steps, part_cond, Counter(), "sample")
            parts.append(x)
        return torch.cat(parts)

    def _lane_batches(self, num_lanes: int, conditions: int) -> Iterator[slice]:
        """The lanes of one forward after the other: whole groups, or parts of them."""
        together = self.groups_per_forward
        for groups in split(0, num_lanes, together and together * (num_lanes // conditions)):
            yield from split(groups.start, groups.stop, self.rows_per_forward)

    # The phases of a rollout, in order.

    def _begin(
        self,
        phases: PhasedPolicy,
        observer: WindowObserver | None,
        x_init: Tensor,
        seed: int,
        iteration: int,
        group_ids: Tensor,
        member_ids: Tensor | None,
    ) -> _RolloutCall:
        conditions, size = group_ids.numel(), self.group_size
        if member_ids is None:
            member_ids = torch.arange(size, device=group_ids.device)
        allowed = (conditions,) if self.share_prefix else (conditions, conditions * size)
        if x_init.shape[0] not in allowed or member_ids.numel() != size:
            raise UsageError(
                f"x_init has {x_init.shape[0]} samples and member_ids {member_ids.numel()} entries for {conditions} "
                f"groups of {size} (share_prefix={self.share_prefix})"
            )
        if self.window_grad and torch.is_inference_mode_enabled():
            raise UsageError(
                "a rollout under torch.inference_mode cannot be replayed: its window forwards would not be the "
                "learner's; use torch.no_grad, or FlowSampler(window_grad=False) where nothing is replayed"
            )
        num_rows, shape, steps = conditions * size, x_init.shape[1:], self._window_steps
        like = working(x_init[:0])
        gaps = [position for position, (before, step) in enumerate(pairwise(steps), start=1) if step != before + 1]
        return _RolloutCall(
            phases=phases,
            observer=observer,
            seed=seed,
            iteration=iteration,
            groups=group_ids.repeat_interleave(size),
            members=member_ids.repeat(conditions),
            x_start=like.new_empty(conditions if self.share_prefix else num_rows, *shape),
            x_next=like.new_empty(len(steps), num_rows, *shape),
            log_prob=like.new_empty(num_rows, len(steps)),
            final=like.new_empty(num_rows, *shape),
            entered={position: like.new_empty(num_rows, *shape) for position in gaps},
        )

    def _prefix_and_branch(
        self, run: _RolloutCall, cond: Condition, x: Tensor, lanes: slice
    ) -> tuple[slice, Tensor, Tensor | None]:
        """Steps up to and including the first stochastic one; returns its rows, their states and history."""
        first, per_lane = self._window_steps[0], run.rows_per_lane
        with phase("rollout/prefix"):
            x, _ = self._steps.walk(run.phases.window, x, None, range(first), cond, run.forwards, "prefix")
        run.x_start[lanes] = x  # [lanes, ...]
        with phase("rollout/window"), exact_only():
            velocity = self._window_velocity(run, x, first, cond).map(lambda v: repeat(working(v), per_lane))
            rows, passes = slice(lanes.start * per_lane, lanes.stop * per_lane), velocity.passes * x.shape[0]
            return rows, *self._stochastic(run, 0, repeat(x, per_lane), velocity, rows, passes)  # [rows, ...]

    def _finish(self, run: _RolloutCall, cond: Condition, x: Tensor, m_prev: Tensor | None, rows: slice) -> None:
        """The other stochastic steps of some rows, and the deterministic ones between and after them."""
        steps = self._window_steps
        for position, step in enumerate(steps[1:], start=1):
            if position in run.entered:
                x, m_prev = self._tail(run, x, m_prev, range(steps[position - 1] + 1, step), cond)
                run.entered[position][rows] = x
            with phase("rollout/window"), exact_only():
                velocity = self._window_velocity(run, x, step, cond)
                x, m_prev = self._stochastic(run, position, x, velocity, rows, velocity.passes * x.shape[0])
        run.final[rows], _ = self._tail(run, x, m_prev, range(steps[-1] + 1, self.table.num_steps), cond)

    @torch.no_grad()
    def finish(
        self, policy: VelocityFn | PhasedPolicy, cond: Condition, x: Tensor, m_prev: Tensor | None = None
    ) -> tuple[Tensor, ForwardCount]:
        """The steps after the window alone, from states that were stored.

        Args:
            policy: its ``tail`` (or ``reuse``) is run.
            cond: the M conditions of the R rows.
            x: [R, ...] states after the last window step.
            m_prev: [R, ...] predicted clean latents of that step, where the table's first tail step reads them.

        Returns:
            Latents [R, ...] at sigma = 0, and the evaluations spent.

        Raises:
            UsageError: the history is missing, or steps are reused of a policy that cannot.
        """
        first, counts = self._window_steps[-1] + 1, Counter[str]()
        if self.table.needs_history(first) and m_prev is None:
            raise UsageError("this tail's solver needs the predicted clean latents of the last window step (m_prev)")
        phases, conditions, final = PhasedPolicy.of(policy), x.shape[0] // self.group_size, torch.empty_like(x)
        for rows in split(0, x.shape[0], self.rows_per_forward):
            part = condition_of(cond, rows, self.group_size, conditions)
            history = None if m_prev is None else m_prev[rows]
            steps = range(first, self.table.num_steps)
            final[rows], _ = self._steps.walk(self._source(phases), x[rows], history, steps, part, counts, "tail")
        return final, ForwardCount(tail=counts["tail"], reused=counts["reused"])

    def _tail(
        self, run: _RolloutCall, x: Tensor, m_prev: Tensor | None, steps: range, cond: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """Deterministic steps after the members have parted."""
        with phase("rollout/tail"):
            return self._steps.walk(self._source(run.phases), x, m_prev, steps, cond, run.forwards, "tail")

    def _source(self, phases: PhasedPolicy) -> VelocityFn | TailSource:
        if not self.reused and self.drift is None:
            return phases.tail
        if phases.reuse is None:
            raise UsageError("this policy leaves nothing behind that a step of the tail could reuse")
        return TailSource(phases.reuse, self.reused, self.drift)

    def _window_velocity(self, run: _RolloutCall, x: Tensor, step: int, cond: Condition) -> Velocity:
        with torch.set_grad_enabled(self.window_grad or run.observer is not None):
            velocity = self._steps.velocity(run.phases.window, x, step, cond)
        run.forwards["window"] += x.shape[0] * velocity.passes
        # Without an observer nobody needs the graph, which would stay alive through the next forward.
        return velocity if run.observer is not None else velocity.map(Tensor.detach)

    def _stochastic(
        self, run: _RolloutCall, position: int, x: Tensor, velocity: Velocity, rows: slice, passes: int
    ) -> tuple[Tensor, Tensor | None]:
        """One stochastic step: stores state and log-probability, returns state and history.

        ``passes`` were spent on ``velocity``, which may be one forward repeated for several rows.
        """
        step = self._window_steps[position]
        key = NoiseKey(run.seed, run.iteration, run.groups[rows], run.members[rows], step, streams.SDE)
        fixed = velocity.map(Tensor.detach)
        taken = self._steps.take(x, fixed, step, key=key)
        assert taken.log_prob is not None  # the table gives window steps c > 0
        run.x_next[position, rows] = taken.x_next
        run.log_prob[rows, position] = taken.log_prob
        if run.observer is not None:
            log_prob = self._steps.log_prob(x, velocity, taken.x_next, step)
            run.observer(ObservedStep(position, rows, log_prob, passes))
        return taken.x_next, self._steps.history(x, fixed, step)

    @property
    def _steps(self) -> Steps:
        return Steps(self.table)

    @property
    def _window_steps(self) -> Sequence[int]:
        if self.table.window is None:
            raise UsageError("this table has no stochastic window; use FlowSampler.sample")
        return self.table.window.steps
