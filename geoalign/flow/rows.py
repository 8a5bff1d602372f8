"""Which conditions and states one forward of a batch takes; rows in shapes as in ``flow/sampler.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geoalign.flow.policy import Condition


def condition_of(cond: Condition, rows: slice, per_condition: int, num_conditions: int) -> Condition:
    """The conditions of ``rows``, each condition having ``per_condition`` of them in a row."""
    if rows.start == 0 and rows.stop == num_conditions * per_condition:
        return cond if per_condition == 1 else cond.repeat_interleave(per_condition)
    first, last = rows.start // per_condition, (rows.stop - 1) // per_condition
    if first == last:  # of one condition: a view, however large its cache is
        one, count = cond.select(slice(first, first + 1)), rows.stop - rows.start
        return one if count == 1 else one.repeat_interleave(count)
    return cond.select(torch.arange(rows.start, rows.stop) // per_condition)  # [rows] condition of each


def split(start: int, stop: int, size: int | None) -> Iterator[slice]:
    """``start`` to ``stop`` in slices of at most ``size``; None: in one."""
    width = max(stop - start if size is None else size, 1)
    for left in range(start, stop, width):
        yield slice(left, min(left + width, stop))


def repeat(x: Tensor, count: int) -> Tensor:
    """Each of n states ``count`` times in a row: [n, ...] to [n * count, ...]."""
    # repeat_interleave by an int: its backward is a sum over a view, which is deterministic on every device.
    return x if count == 1 else x.repeat_interleave(count, 0)


def working(x: Tensor) -> Tensor:
    """Latents are float32 throughout (float64 in exactness tests), whatever dtype the caller made them in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
