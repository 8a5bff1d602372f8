"""What the sampler asks of a policy and of its conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor, Any], Tensor]
"""velocity = f(x [B, ...], timestep [B] in 0..1000, cond of B conditions); like x, any floating dtype."""


class Condition(Protocol):
    """B conditions. `Conditioning` of the models and `RetakeBatch` are such."""

    def repeat_interleave(self, count: int) -> Self:
        """Each condition `count` times in a row."""
        ...

    def select(self, index: Tensor) -> Self:
        """The conditions at int64 [N]; needed only when forwards are split (`rows_per_forward`)."""
        ...


@dataclass(frozen=True, slots=True)
class PhasedPolicy:
    """One policy executed in up to three ways.

    `window` must be the very artefact that the learner runs (same kernels, dtype, graph, gradient mode), because its
    log-probabilities enter the ratio. `prefix` and `tail` may be anything faster: no log-probability is taken there.
    """

    prefix: VelocityFn
    window: VelocityFn
    tail: VelocityFn

    @staticmethod
    def of(policy: VelocityFn | PhasedPolicy) -> PhasedPolicy:
        """A phased policy as it is; a plain velocity function for all three phases."""
        return policy if isinstance(policy, PhasedPolicy) else PhasedPolicy(policy, policy, policy)
