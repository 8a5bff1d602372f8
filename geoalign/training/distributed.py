"""Several processes: replicated parameters, gradients summed once per update (gloo or NCCL, torchrun)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from geoalign.errors import RunError
from geoalign.training.engine import Engine, LocalEngine


class ReplicatedEngine(Engine):
    """Data parallelism over ``torch.distributed``; parameters and optimizer are replicated.

    Gradients of an update are complete only after its last backward, so they are summed then, in one collective, rather
    than per backward as a wrapper module would.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        cuda = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
        """Reduce over the ranks; the result lies where ``tensor`` lay.

        Raises:
            RunError: a rank died or did not answer in time.
        """
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[operation]
        moved = tensor.to(self._device).contiguous()
        try:
            dist.all_reduce(moved, kind)
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} of {self.world_size}: another rank died or hangs ({str(error).splitlines()[0]}); "
                "see the logs of the other ranks, then continue with --resume auto"
            ) from error
        return moved.to(tensor.device)


@contextmanager
def engine_of_environment(timeout_s: float) -> Iterator[Engine]:
    """The engine that torchrun's environment asks for: one process without it, else a process group for the block.

    Args:
        timeout_s: how long a collective waits for the other ranks before the run ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield LocalEngine()
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield ReplicatedEngine()
    finally:
        dist.destroy_process_group()
