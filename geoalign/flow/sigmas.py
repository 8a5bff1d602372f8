"""Time grids of the rectified flow x_sigma = (1 - sigma) x0 + sigma n, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(u: Tensor, shift: float) -> Tensor:
    """Time-shifted noise level m u / (1 + (m - 1) u) of u in [0, 1]; float64 in, float64 out."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def full_grid(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from exactly 1 to exactly 0."""
    return shifted(_uniform(1.0, steps), shift)


def flash_grid(steps: int, shift: float, window_stop: int, tail_ratio: float) -> Tensor:
    """Noise levels of a rollout whose tail is coarser than the full grid (MixGRPO-Flash, arXiv 2507.21802).

    Nodes 0 .. window_stop are those of the full grid. From there n - 1 steps, uniform in the unshifted time, lead to
    exactly 0, where n = floor((steps - window_stop + 1) tail_ratio), but at least one step is taken.
    The number of steps is window_stop + n - 1.
    """
    if tail_ratio == 1.0:
        return full_grid(steps, shift)
    head = _uniform(1.0, steps)[: window_stop + 1]
    # The relative slack undoes the rounding of products such as 20 * 0.4 that fall just below an integer.
    nodes = int((steps - window_stop + 1) * tail_ratio * (1 + 1e-12))
    tail = _uniform(float(head[-1]), max(nodes - 1, 1))[1:]
    return shifted(torch.cat([head, tail]), shift)


def _uniform(top: float, steps: int) -> Tensor:
    # A quotient of integers, not torch.linspace: both ends are exact and node k does not depend on the vector width.
    return top * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
