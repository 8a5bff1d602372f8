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


def most_informative(advantage: Tensor, valid: Tensor, lost: Tensor, group_size: int, count: int | None) -> Tensor:
    """[N] bool: the ``count`` members of every group whose terms say most, earlier ones at a tie.

    First those that were read, by the magnitude of their advantage. A lost member's advantage is no measurement but the
    lowest of its group, so it comes after every one that was read; then come those without a term (advantage 0), and
    invalid ones last, which no update learns from. The terms of the others are dropped and nothing is rescaled: the
    gradient is biased.

    Args:
        advantage: [N].
        valid, lost: [N] bool, of :class:`geoalign.rl.score.Scores`.
        group_size: members of a group, next to each other.
        count: None takes all.
    """
    if count is None or count >= group_size:
        return torch.ones(len(advantage), dtype=torch.bool)
    size = advantage.abs().cpu().view(-1, group_size)
    valid, lost = (mask.cpu().view(-1, group_size) for mask in (valid, lost))
    rank = torch.where(size > 0, torch.where(lost, 2, 3), 1).where(valid, 0)
    order = size.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :count], True).flatten()
