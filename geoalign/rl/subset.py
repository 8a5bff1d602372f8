"""Cheaper learning: which window steps and which members of a group an update learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels import philox_uniform, streams


def learned_positions(size: int, count: int | None, seed: int, iteration: int) -> tuple[int, ...]:
    """The window positions of an iteration whose gradients are taken: ``count`` of ``size``, all equally likely.

    The loss over them is divided by ``count`` where that over all is divided by ``size``, so its expectation is the
    loss over all. Equal on all ranks and after resume; None takes all.
    """
    if count is None or count >= size:
        return tuple(range(size))
    draws = torch.as_tensor(philox_uniform(size, seed, iteration, 0, 0, 0, streams.SUBSET))
    return tuple(sorted(draws.argsort()[:count].tolist()))


def most_informative(advantage: Tensor, group_size: int, count: int | None) -> Tensor:
    """[N] bool: the ``count`` members of every group with the largest advantages in magnitude, earlier ones at a tie.

    The others' terms are dropped and nothing is rescaled: they are the smallest of the sum. The gradient is biased.
    """
    if count is None or count >= group_size:
        return torch.ones(len(advantage), dtype=torch.bool)
    order = advantage.abs().view(-1, group_size).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros(order.shape, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :count].cpu(), True).flatten()
