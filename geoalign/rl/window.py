"""Window schedules: which steps are stochastic in an iteration. Pure functions: a resumed run needs no window state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geoalign.config.flow import WindowConfig
from geoalign.errors import ConfigError
from geoalign.flow.table import StepWindow


@dataclass(frozen=True, slots=True)
class WindowSchedule:
    """The window of every iteration: equal on every rank and after resume (sliding windows: arXiv 2507.21802).

    Args:
        config: kind and geometry of the schedule.
        steps: sampling steps T; step T - 1 is never in a window.
        seed: run seed; read by the random schedule only.

    Raises:
        ConfigError: no window of that size fits.
    """

    config: WindowConfig
    steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        if reason := self.config.misfit(self.steps):
            raise ConfigError(reason)

    @property
    def max_start(self) -> int:
        """The largest window start."""
        limit = self.steps - 1 - self.config.size
        return limit if self.config.max_start is None else self.config.max_start

    def __call__(self, iteration: int) -> StepWindow:
        """The window of ``iteration`` (0, 1, ...)."""
        start = self._start(iteration)
        return StepWindow(start, start + self.config.size)

    def _start(self, iteration: int) -> int:
        match self.config.kind:
            case "fixed":
                return self.config.start
            case "random":
                return self._random(iteration // self.config.interval)
            case "progressive":
                position = iteration // self.config.interval
            case "exp_decay":
                position = self._decayed(iteration)
        if self.config.end == "roll_back":
            position %= self._num_positions
        return min(self.config.start + self.config.stride * position, self.max_start)

    @property
    def _num_positions(self) -> int:
        return (self.max_start - self.config.start) // self.config.stride + 1

    def _decayed(self, iteration: int) -> int:
        lasts = [self._duration(position) for position in range(self._num_positions)]
        if self.config.end == "roll_back":
            iteration %= sum(lasts)
        for position, duration in enumerate(lasts):
            if iteration < duration:
                return position
            iteration -= duration
        return self._num_positions  # as progressive windows do: past the last whole stride, at the largest start

    def _duration(self, position: int) -> int:
        late = max(0, self.config.start + self.config.stride * position - self.config.decay_start)
        return max(1, math.ceil(self.config.interval * math.exp(-self.config.decay_rate * late)))  # exp(-800) is 0

    def _random(self, draw: int) -> int:
        from geoalign_kernels import philox_uniform, streams  # imports torch; the other schedules are plain integers

        uniform = float(philox_uniform(1, self.seed, draw, 0, 0, 0, streams.WINDOW)[0])
        return self.config.start + int(uniform * (self.max_start - self.config.start + 1))
