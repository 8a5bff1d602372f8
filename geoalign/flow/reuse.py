"""Deterministic steps that are not evaluated: which of them, and where their velocity comes from.

The steps are chosen once, from the drift that an exact tail shows, and are then a pure function of the step table:
equal for all members of a group and on all ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.flow.policy import Velocity, VelocityFn
from geoalign.flow.table import StepTable

_SAME_LEVEL = 1e-9
"""Noise levels of one schedule that are nearer than this are one level."""


def tail_of(table: StepTable) -> range:
    """The steps after the window; all steps of a table without one."""
    return range(0 if table.window is None else table.window.stop, table.num_steps)


@dataclass(frozen=True, slots=True)
class Reuse:
    """A velocity function in two parts.

    Attributes:
        evaluate: (x, timestep, cond) -> velocity, and what may serve later steps of the same rows.
        again: (x, timestep, cond, kept) -> velocity at another state without running the network.
    """

    evaluate: Callable[[Tensor, Tensor, Any], tuple[Tensor | Velocity, Any]]
    again: Callable[[Tensor, Tensor, Any, Any], Tensor | Velocity]

    @staticmethod
    def of_velocity(function: VelocityFn) -> Reuse:
        """The last velocity itself serves the steps that follow."""

        def evaluate(x: Tensor, timestep: Tensor, cond: Any) -> tuple[Velocity, Velocity]:
            velocity = Velocity.of(function(x, timestep, cond))
            return velocity, velocity

        return Reuse(evaluate, lambda x, timestep, cond, kept: kept)


@dataclass(frozen=True, slots=True)
class DriftProfile:
    """How far the velocity moves along an exact tail if it is taken from the step before.

    Attributes:
        sigmas: falling noise levels of the measured steps, at least two.
        drift: sum up to each level of the root mean square differences between reused and evaluated velocity, from 0.
    """

    sigmas: Sequence[float]
    drift: Sequence[float]

    def __post_init__(self) -> None:
        falling = all(b < a for a, b in pairwise(self.sigmas))
        rising = all(0 <= a <= b < math.inf for a, b in pairwise(self.drift))
        if len(self.sigmas) != len(self.drift) or len(self.sigmas) < 2 or not (falling and rising):
            raise UsageError(
                "a drift profile needs two or more falling noise levels and a finite, rising drift for each"
            )

    def at(self, sigma: float) -> float:
        """Drift at a level: linear between measured ones, and beyond them as between the last two."""
        place = bisect_left([-level for level in self.sigmas], -sigma)
        right = min(max(place, 1), len(self.sigmas) - 1)
        (s0, s1), (d0, d1) = self.sigmas[right - 1 : right + 1], self.drift[right - 1 : right + 1]
        return d0 + (s0 - sigma) / (s0 - s1) * (d1 - d0)

    def reaches(self, table: StepTable) -> bool:
        """Whether it was measured from the end of the table's window on, or from before."""
        return self.sigmas[0] >= float(table.sigmas[tail_of(table).start]) - _SAME_LEVEL


class DriftMeter:
    """Sums, per step, the squared difference between what reuse would have given and what was evaluated."""

    def __init__(self, table: StepTable) -> None:
        self._table = table
        self.sums = torch.zeros(table.num_steps, 2, dtype=torch.float64)  # squares, numbers
        """To be added over ranks before :meth:`profile`."""

    def add(self, step: int, reused: Velocity, evaluated: Velocity) -> None:
        """Take one step of some rows."""
        difference = (reused.combined() - evaluated.combined()).double().flatten(1)
        squares = difference.square().sum(1)
        squares = squares[torch.isfinite(squares)]  # a failed sample must not hide the others
        self.sums[step] += torch.tensor([float(squares.sum()), squares.numel() * difference.shape[1]])

    def profile(self) -> DriftProfile | None:
        """The profile of the steps that were measured; None if none were: no sample is finite."""
        seen = [step for step in range(self._table.num_steps) if self.sums[step, 1] > 0]
        if not seen:
            return None
        drift = (self.sums[seen, 0] / self.sums[seen, 1]).sqrt().tolist()
        levels = self._table.sigmas.tolist()
        return DriftProfile([levels[step] for step in (seen[0] - 1, *seen)], list(accumulate(drift, initial=0.0)))


def reused_steps(table: StepTable, profile: DriftProfile, evaluated: int) -> frozenset[int]:
    """The steps after the window that reuse: all but ``evaluated`` of them.

    A reused step k that follows the evaluated step i moves the state by (sigma_k - sigma_{k+1}) times the drift between
    i and k. The evaluated steps, of which the first is one, are those with the smallest sum, found by dynamic
    programming; it is what the whole tail is wrong by at most, to first order.
    """
    steps = tail_of(table)
    first = steps.start
    levels = table.sigmas.tolist()
    drift = {k: profile.at(levels[k]) for k in steps}
    count = min(max(evaluated, 1), len(steps))

    def gap(start: int, stop: int) -> float:
        return sum((levels[k] - levels[k + 1]) * (drift[k] - drift[start]) for k in range(start + 1, stop))

    # best[k]: the least error of steps first..k-1 with some number of evaluated ones, and those ones
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (gap(first, stop), (first,)) for stop in (*steps[1:], table.num_steps)
    }
    for _ in range(count - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in best:
            options: list[tuple[float, tuple[int, ...]]] = [
                (best[k][0] + gap(k, stop), (*best[k][1], k)) for k in best if k < stop
            ]
            if options:
                longer[stop] = min(options)
        best = longer
    return frozenset(steps) - {*best[table.num_steps][1]}


@dataclass(slots=True)
class TailSource:
    """Velocities of some rows along a tail, some of them reused.

    Attributes:
        reuse: where they come from.
        reused: steps that take what the last evaluated one kept.
        meter: told how far reuse would be off at every evaluated step, or None.
    """

    reuse: Reuse
    reused: frozenset[int]
    meter: DriftMeter | None = None
    _kept: Any = field(default=None, init=False)

    def at(self, step: int, x: Tensor, timestep: Tensor, cond: Any) -> tuple[Velocity, bool]:
        """The velocity, and whether the network was evaluated."""
        if step in self.reused and self._kept is not None:
            return Velocity.of(self.reuse.again(x, timestep, cond, self._kept)), False
        value, kept = self.reuse.evaluate(x, timestep, cond)
        velocity = Velocity.of(value)
        if self.meter is not None and self._kept is not None:
            self.meter.add(step, Velocity.of(self.reuse.again(x, timestep, cond, self._kept)), velocity)
        self._kept = kept
        return velocity, True
