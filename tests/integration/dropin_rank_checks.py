"""Run by torchrun from ``test_dropin.py``: two ranks with half a batch each, DDP and FSDP2, against one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from dropin_models import error, inputs, output, wan
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from geoalign.training.processes.torchrun import ranks_of_environment
from geoalign_kernels import accelerate


def gradients(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Gradients of the mean over samples, as one vector."""
    output(model, given).square().flatten(1).sum(1).mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])


def check(rank: int) -> None:
    given = inputs()
    half = {name: value[rank : rank + 1] for name, value in given.items()}
    whole = gradients(wan(), given)  # untouched, in one process
    model = wan()
    accelerate(model)
    ddp = gradients(DistributedDataParallel(model), half)
    assert error(ddp, whole) < 1e-6, error(ddp, whole)
    model = wan()
    accelerate(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = gradients(model, half)
    assert error(sharded, whole) < 1e-6, error(sharded, whole)
    if rank == 0:
        print("ok ddp", "ok fsdp2", sep="\n")


if __name__ == "__main__":
    with ranks_of_environment(1, 120.0, cuda=False):
        check(dist.get_rank())
