"""Several processes, of torchrun or of ``run.ranks``, behind the :class:`Ranks` interface (gloo or NCCL)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geoalign.errors import ConfigError, RunError
from geoalign.models.parallel import SequenceParallel
from geoalign.training.processes.launcher import meeting_place
from geoalign.training.processes.ranks import LocalRanks, Operation, Ranks

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class ProcessRanks(Ranks):
    """The ranks of a ``torch.distributed`` process group.

    Host tensors are reduced by gloo, device tensors by NCCL. A device collective with a rank that is gone waits inside
    a kernel and cannot be interrupted, so :meth:`check_alive` lets the hosts meet first: those that wait learn which
    rank is missing and end with a message.
    """

    def __init__(self, sequence: int, timeout_s: float) -> None:
        self.rank, self.size, self.sequence = dist.get_rank(), dist.get_world_size(), sequence
        self._timeout = timedelta(seconds=timeout_s)
        self._hosts: Any = dist.new_group(backend="gloo", timeout=self._timeout) if _on_cuda() else dist.group.WORLD

    def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
        """Reduce over the ranks, where the tensor lies.

        Raises:
            RunError: a rank died or did not answer in time.
        """
        group = dist.group.WORLD if tensor.is_cuda else self._hosts
        if tensor.is_cuda:
            self.check_alive()
        tensor = tensor.contiguous()
        self._guarded(lambda: dist.all_reduce(tensor, _OPERATIONS[operation], group=group))
        return tensor

    def check_alive(self) -> None:
        """Meet on the hosts; raises RunError naming a rank that does not come."""
        self._guarded(lambda: dist.monitored_barrier(self._hosts, timeout=self._timeout, wait_all_ranks=self.rank == 0))

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> RunError:
        """What to tell the user when a collective failed."""
        return RunError(
            f"rank {self.rank} of {self.size}: another rank died or hangs ({str(error).splitlines()[0]}); "
            "see the logs of the other ranks, then continue with --resume auto"
        )

    def sequence_group(self) -> SequenceParallel | None:
        """A process group per ``sequence`` neighbours; every rank creates all of them, as torch wants it."""
        if self.sequence == 1:
            return None
        groups = [
            dist.new_group(list(range(first, first + self.sequence)), timeout=self._timeout)
            for first in range(0, self.size, self.sequence)
        ]
        mine: Any = groups[self.data_rank]

        def exchange(rows: Tensor) -> Tensor:
            received = torch.empty_like(rows)
            self._guarded(lambda: dist.all_to_all_single(received, rows, group=mine))
            return received

        return SequenceParallel.register("sequence", self.sequence_rank, self.sequence, exchange)


def _on_cuda() -> bool:
    return dist.get_backend() != "gloo"


@contextmanager
def ranks_of_environment(sequence: int, timeout_s: float, *, cuda: bool) -> Iterator[Ranks]:
    """The ranks that the environment asks for: one process without any, else a process group for the block.

    Args:
        sequence: neighbouring ranks that share the tokens of a rollout.
        timeout_s: how long a collective waits for the other ranks before the run ends.
        cuda: whether tensors lie on GPUs, one per process.

    Raises:
        ConfigError: several ranks are to share tokens, but there is one process.
        RunError: the ranks did not meet, or a collective inside the block failed, also one of the libraries' own (FSDP,
            DeepSpeed).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if sequence > 1:
            raise ConfigError(f"parallel.sequence {sequence} needs at least that many processes: run.ranks or torchrun")
        yield LocalRanks()
        return
    ranks = _meet(sequence, timeout_s, cuda=cuda)
    try:
        yield ranks
    except RuntimeError as error:
        if _of_a_collective(error):
            raise ranks.lost(error) from error
        raise
    dist.destroy_process_group()  # after success only: it waits for ranks that may be gone


def _meet(sequence: int, timeout_s: float, *, cuda: bool) -> ProcessRanks:
    """Join the process group of the environment; raises RunError if another rank does not come."""
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    try:
        where = {
            "init_method": meeting_place(), "rank": rank, "world_size": size, "timeout": timedelta(seconds=timeout_s),
        }  # fmt: skip
        if cuda:
            local = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(local)
            dist.init_process_group("nccl", device_id=torch.device("cuda", local), **where)
        else:
            dist.init_process_group("gloo", **where)
        return ProcessRanks(sequence, timeout_s)
    except (RuntimeError, ValueError) as error:  # the latter: a variable of torchrun's is missing
        raise RunError(
            f"rank {rank} of {size}: the ranks did not meet ({str(error).splitlines()[0]}); see the logs of the other "
            "ranks, then start all of them again"
        ) from error


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
