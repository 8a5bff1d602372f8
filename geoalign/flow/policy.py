"""What the sampler asks of a policy and of its conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from geoalign.flow.reuse import Reuse


@dataclass(frozen=True, slots=True, eq=False)
class Velocity:
    """Velocities of B states; under classifier-free guidance the two that the step kernel combines.

    Attributes:
        value: [B, ...], any floating dtype.
        uncond: like ``value``, under the negative prompt, or None.
        guidance: v = uncond + guidance (value - uncond); read only with ``uncond``.
    """

    value: Tensor
    uncond: Tensor | None = None
    guidance: float = 1.0

    @staticmethod
    def of(answer: Tensor | Velocity) -> Velocity:
        """What a velocity function answered."""
        return answer if isinstance(answer, Velocity) else Velocity(answer)

    @property
    def passes(self) -> int:
        """Network passes spent per sample."""
        return 1 if self.uncond is None else 2

    def map(self, change: Callable[[Tensor], Tensor]) -> Velocity:
        """The same change on both tensors."""
        uncond = None if self.uncond is None else change(self.uncond)
        return Velocity(change(self.value), uncond, self.guidance)

    def combined(self) -> Tensor:
        """The velocity that the step takes, at least in float32."""
        v = self.value.to(torch.promote_types(self.value.dtype, torch.float32))
        if self.uncond is None:
            return v
        u = self.uncond.to(v.dtype)
        return u + self.guidance * (v - u)


VelocityFn = Callable[[Tensor, Tensor, Any], Tensor | Velocity]
"""velocity = f(x [B, ...], timestep [B] in 0..1000, cond of B conditions); like x, any floating dtype."""


class Condition(Protocol):
    """B conditions. ``Conditioning`` of the models and ``RetakeBatch`` are such."""

    def repeat_interleave(self, count: int) -> Self:
        """Each condition ``count`` times in a row."""
        ...

    def select(self, index: Tensor | slice) -> Self:
        """The conditions at int64 [N] or in a slice; needed only when forwards are split (``rows_per_forward``)."""
        ...


@dataclass(frozen=True, slots=True)
class PhasedPolicy:
    """One policy executed in up to two ways.

    ``window`` must be the very artefact that the learner runs (same kernels, dtype, graph, gradient mode), because its
    log-probabilities enter the ratio. It serves the steps before the window too: a group shares them, so they are few,
    and what they end in decides which states are trained, which no comparison of tails would see. ``tail`` may be
    anything faster: no log-probability is taken there.
    """

    window: VelocityFn
    tail: VelocityFn
    reuse: Reuse | None = None
    """``tail`` in two parts, for tails of which not every step is evaluated."""

    @staticmethod
    def of(policy: VelocityFn | PhasedPolicy) -> PhasedPolicy:
        """A phased policy as it is; a plain velocity function for all phases."""
        return policy if isinstance(policy, PhasedPolicy) else PhasedPolicy(policy, policy)
