"""The trained state as whole tensors by name: what engines give and take, and what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from geoalign.files.weights import require, shapes_of


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whole tensors by parameter name, alike for every engine and number of ranks.

    Attributes:
        values: trained parameters, at least float32.
        average: their moving average, or the values themselves.
        optimizer: parameter name -> ``exp_avg``, ``exp_avg_sq``, ``step``, ...
    """

    values: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]


def whole_on_cpu(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copies on the CPU, made one after another; what is sharded is gathered from all ranks, which all must call this.

    ``keep`` False takes part and returns nothing.
    """
    copies = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            copies[name] = value.to("cpu", copy=True)
    return copies


def sharded_like(whole: Tensor, target: Tensor) -> Tensor:
    """``whole``, distributed over the ranks as ``target`` is."""
    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def copy_strictly(values: Mapping[str, Tensor], into: Mapping[str, Tensor], what: str) -> None:
    """Copy whole tensors by name; both name sets and all shapes must agree.

    Raises:
        CheckpointError: lists the first missing, unexpected or wrongly shaped names.
    """
    require(what, shapes_of(values), shapes_of(into), "does not fit this model")
    for name, target in into.items():
        target.copy_(sharded_like(values[name], target))
