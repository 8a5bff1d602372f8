"""Time grids of the rectified flow x_sigma = (1 - sigma) x0 + sigma n, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.config.flow import TailGrid


def shifted(u: Tensor, shift: float) -> Tensor:
    """Time-shifted noise level m u / (1 + (m - 1) u) of u in [0, 1]; float64 in, float64 out."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def full_grid(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from exactly 1 to exactly 0."""
    return shifted(_uniform(1.0, steps), shift)


def grid_with_tail(steps: int, shift: float, window_stop: int, tail_steps: int, grid: TailGrid) -> Tensor:
    """Noise levels [window_stop + tail_steps + 1] of a rollout with a tail of its own.

    Nodes 0 .. window_stop are those of the full grid. From there ``tail_steps`` steps lead to exactly 0: uniform in the
    unshifted time (``schedule``, MixGRPO-Flash, arXiv 2507.21802; with all remaining steps this is the full grid), or
    uniform in sigma (a large shift crowds the schedule's steps where the velocity hardly moves).
    """
    if grid == "schedule" and tail_steps == steps - window_stop:
        return full_grid(steps, shift)
    head = _uniform(1.0, steps)[: window_stop + 1]
    if grid == "sigma":
        head = shifted(head, shift)
        return torch.cat([head, _uniform(float(head[-1]), tail_steps)[1:]])
    return shifted(torch.cat([head, _uniform(float(head[-1]), tail_steps)[1:]]), shift)


def _uniform(top: float, steps: int) -> Tensor:
    # A quotient of integers, not torch.linspace: both ends are exact and node k does not depend on the vector width.
    return top * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
