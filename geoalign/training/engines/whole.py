"""What engines share whose ranks hold whole parameters: masters, their average, and the first half of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geoalign.config.training import OptimConfig
from geoalign.training.engines.masters import MasterWeights, MovingAverage
from geoalign.training.engines.snapshot import Snapshot, copy_strictly, whole_on_cpu
from geoalign.training.processes.ranks import Ranks


class WholeParameters:
    """Base of engines without sharded parameters.

    Args:
        trained: parameters of the network's graph by name, in the precision of the loaded weights.
        config: decay of the average.
        ranks: the processes.
        dtype: that the network will compute in.
        separate: see :class:`MasterWeights`.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        config: OptimConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        *,
        separate: bool = False,
    ) -> None:
        self.trained, self._ranks = trained, ranks
        self._masters = MasterWeights(trained, dtype, separate=separate)
        self._average = MovingAverage(self._masters.values, config.ema)

    def begin(self) -> None:
        """Forget all gradients."""
        self._masters.clear()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss."""
        loss.backward()

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients that were computed elsewhere."""
        self._masters.accumulate(gradients)

    def swap_average(self) -> None:
        """Exchange parameters and moving average."""
        self._average.swap()
        self._masters.publish()

    def _updated(self) -> None:
        """To be called after the masters were updated."""
        self._average.update()
        self._masters.publish()

    def _snapshot(self, optimizer: Mapping[str, Mapping[str, Tensor]], keep: bool) -> Snapshot:
        states = {name: whole_on_cpu(entry) for name, entry in optimizer.items() if keep}
        return Snapshot(whole_on_cpu(self._masters.values, keep), whole_on_cpu(self._average.state(), keep), states)

    def _restore_values(self, snapshot: Snapshot) -> None:
        copy_strictly(snapshot.values, self._masters.values, "checkpoint")
        if self._average.average:
            copy_strictly(snapshot.average, self._average.average, "moving average of the checkpoint")
        self._masters.publish()
