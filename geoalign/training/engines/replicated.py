"""Data parallelism with replicated parameters and optimizer: one gradient sum per update.

Gradients of an update are complete only after its last backward, so they are summed then, in one collective, rather
than per backward as a wrapper module would.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from geoalign.config.training import OptimConfig
from geoalign.training.engines.optim import build_adamw, load_optimizer_state, optimizer_state
from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.engines.whole import WholeParameters
from geoalign.training.processes.ranks import Ranks


class ReplicatedEngine(WholeParameters):
    """Every rank holds all trained parameters; implements :class:`Engine`."""

    def __init__(
        self, trained: Mapping[str, nn.Parameter], config: OptimConfig, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        super().__init__(trained, config, ranks, dtype)
        self._clip = config.grad_clip
        self.optimizer = build_adamw(self._masters.values, config)

    def step(self) -> float:
        """Sum over the ranks, clip, update; the norm is that of the sum, hence equal on all ranks."""
        values = list(self._masters.values.values())
        summed = self._masters.gradients()
        if self._ranks.size > 1:
            summed = self._ranks.sum_tensors(summed, "gradients")
        for value, gradient in zip(values, summed, strict=True):
            value.grad = gradient.to(value.dtype)
        norm = nn.utils.clip_grad_norm_(values, self._clip)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self._updated()
        return float(norm)

    def snapshot(self, keep: bool = True) -> Snapshot:
        """Copies on the CPU."""
        return self._snapshot(optimizer_state(self.optimizer, self._masters.values), keep)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; raises CheckpointError if names or shapes differ."""
        self._restore_values(snapshot)
        load_optimizer_state(self.optimizer, self._masters.values, snapshot.optimizer)
