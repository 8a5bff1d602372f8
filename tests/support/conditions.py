"""The least that a condition must offer, for policies that are written out in a test."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """One value, or one vector, per condition: ``z`` [M, ...]."""

    z: Tensor

    @property
    def conditioning(self) -> Cond:
        """What the learner computes it from again: itself."""
        return self

    def repeat_interleave(self, count: int) -> Cond:
        return Cond(self.z.repeat_interleave(count, 0))

    def select(self, index: Tensor | slice) -> Cond:
        return Cond(self.z[index])
