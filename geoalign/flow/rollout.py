"""What the learner keeps of a rollout: the states at the window's boundaries and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor

from geoalign.flow.table import StepTable


@dataclass(frozen=True, slots=True)
class ForwardCount:
    """Evaluations of the network, counted per sample (a forward of a batch of 12 counts 12)."""

    prefix: int = 0
    window: int = 0
    tail: int = 0
    reused: int = 0
    """Tail steps that took what an earlier one left: no evaluation, and in no total."""

    @property
    def total(self) -> int:
        """All phases."""
        return self.prefix + self.window + self.tail

    def __add__(self, other: ForwardCount) -> ForwardCount:
        mine, theirs = astuple(self), astuple(other)
        return ForwardCount(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """R = M * G trajectories of M conditions; row i belongs to condition i // G.

    Attributes:
        x_start: state at the window's start, float32 [M, ...] if the prefix is shared, else [R, ...].
        x_next: [K, R, ...] float32, state after each of the K window steps.
        log_prob: [R, K] float32, element means, reduced from the stored x_next.
        final: [R, ...] float32, latents at sigma = 0.
        table: the step table that was walked.
        group_size: G.
        forwards: network evaluations spent.
        entered: position: [R, ...] state before a window step that does not follow the window step before it. Empty
            where the stochastic steps are consecutive, as each then starts from the stored state of the last one.
    """

    x_start: Tensor
    x_next: Tensor
    log_prob: Tensor
    final: Tensor
    table: StepTable
    group_size: int
    forwards: ForwardCount
    entered: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.final.shape[0]

    @property
    def num_window_steps(self) -> int:
        """K."""
        return self.x_next.shape[0]

    @property
    def shared(self) -> bool:
        """Whether all members of a group start the window in one stored state."""
        return self.x_start.shape[0] != self.num_rows or self.group_size == 1

    def state(self, position: int) -> Tensor:
        """State before window step ``position``: [M, ...] for the first one of a shared prefix, else [R, ...]."""
        if position == 0:
            return self.x_start
        return self.entered[position] if position in self.entered else self.x_next[position - 1]

    def neutralised(self) -> tuple[Rollout, Tensor]:
        """This rollout with every non-finite row set to zero, and which rows were finite ([R] bool).

        A masked sample must not carry NaN through the learner (zero times NaN is NaN), yet the batch shape has to stay
        as it was: kernels of another batch shape round differently. A shared start is set to zero if none of its
        members is finite.
        """
        finite = torch.isfinite(self.log_prob).all(1) & torch.isfinite(self.final).flatten(1).all(1)
        finite &= torch.isfinite(self.x_next).flatten(2).all(2).all(0)
        start = torch.isfinite(self.x_start).flatten(1).all(1)
        per_start = self.num_rows // start.numel()
        finite &= start.repeat_interleave(per_start)
        usable = finite.view(-1, per_start).any(1)
        cleaned = replace(
            self,
            x_start=_where(usable, self.x_start),
            x_next=torch.stack([_where(finite, state) for state in self.x_next]),
            log_prob=_where(finite, self.log_prob),
            final=_where(finite, self.final),
            entered={position: _where(finite, state) for position, state in self.entered.items()},
        )
        return cleaned, finite


def _where(keep: Tensor, values: Tensor) -> Tensor:
    return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))
