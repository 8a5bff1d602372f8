"""A moment by which work has to be done, shared by processes: seconds of `time.time()`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """Asked before anything is started.

    Attributes:
        until: the moment; never, if not given.
        clock: seconds now.
    """

    until: float = math.inf
    clock: Callable[[], float] = time.time

    @property
    def left_s(self) -> float:
        """Seconds that remain; below 0 after it."""
        return self.until - self.clock()

    def late(self, seconds: float = 0.0) -> str:
        """Why work of so many seconds is not started any more; empty if it is."""
        left = self.left_s
        return "" if seconds <= left else f"out of time: {max(left, 0.0):.0f} s were left, about {seconds:.0f} wanted"
