"""What the learner asks of an engine, and the engine of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from geoalign.config.schema import Config
from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.processes.ranks import Ranks

if TYPE_CHECKING:
    from geoalign.models.dit import RetakeDiT


class Engine(Protocol):
    """Accumulates gradients of the trained parameters and updates them; every rank calls every method alike.

    Attributes:
        trained: the parameters as the network's graph has them, by name.
        optimizer: its ``param_groups`` carry the learning rates.
    """

    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def begin(self) -> None:
        """Forget all gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss (global denominators: ranks are summed)."""
        ...

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients that were computed elsewhere."""
        ...

    def step(self) -> float:
        """Sum over the ranks, clip, update unless the norm is not finite; returns the norm before clipping."""
        ...

    def swap_average(self) -> None:
        """Exchange parameters and moving average; call it twice around an evaluation."""
        ...

    def snapshot(self, keep: bool = True) -> Snapshot:
        """Copies on the CPU of everything a checkpoint holds; a collective.

        ``keep`` False takes part and gives an empty one, for ranks that need none.
        """
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; raises CheckpointError if names or shapes differ."""
        ...


def build_engine(
    config: Config, model: RetakeDiT, trained: Mapping[str, nn.Parameter], ranks: Ranks, dtype: torch.dtype
) -> Engine:
    """The engine that ``parallel.engine`` names, for matrices of ``dtype``.

    Raises:
        ConfigError: it cannot run here.
    """
    match config.parallel.engine:
        case "ddp":
            from geoalign.training.engines.replicated import ReplicatedEngine

            return ReplicatedEngine(trained, config.optim, ranks, dtype)
        case "deepspeed":
            from geoalign.training.engines.zero import DeepSpeedEngine

            return DeepSpeedEngine(trained, config.optim, ranks, dtype, config.parallel.zero_stage)
        case "fsdp":
            from geoalign.training.engines.fsdp import ShardedEngine

            return ShardedEngine(model, trained, config.optim, ranks, dtype)
