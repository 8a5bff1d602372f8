"""One transition of another project's sampler on the project's step ops: what all shims share.

The log-probability is reduced from the next state as it is handed on, by the routine that a replay calls: equal states
and velocities of equal batch shape give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.flow.table import sde_row
from geoalign_kernels import flow_log_prob, flow_step

Generator = torch.Generator | Sequence[torch.Generator] | None


class Levels(NamedTuple):
    """Noise levels of a batch, host numbers."""

    sigma: list[float]
    """[B], or one for all."""
    after: list[float]
    """Likewise, of the next nodes."""
    second: float
    """Of the grid's second node."""

    @property
    def step(self) -> Tensor:
        """[B] float64: sigma - after."""
        return torch.tensor(self.sigma, dtype=torch.float64) - torch.tensor(self.after, dtype=torch.float64)


class Transition(NamedTuple):
    """A stochastic step, or the replay of one; B samples."""

    next: Tensor
    """[B, ...] float32, without graph."""
    log_prob: Tensor
    """[B] float32 element means, with the graph of the velocity."""
    mean: Tensor
    """[B, ...] float32, with the graph of the velocity."""
    std: Tensor
    """[B or 1, 1, ...] float32: of the whole step (coefficient c)."""


def levels_of(scheduler: Any, timestep: Tensor) -> Levels:
    """Levels of ``timestep`` ([] or [B], some of ``scheduler.timesteps``) on the grid of a diffusers scheduler."""
    grid = scheduler.sigmas.tolist()
    steps = [int(scheduler.index_for_timestep(t)) for t in timestep.reshape(-1)]
    return Levels([grid[k] for k in steps], [grid[k + 1] for k in steps], grid[1])


def take(
    sde: SdeVariant,
    eta: float,
    levels: Levels,
    sample: Tensor,
    velocity: Tensor,
    *,
    next: Tensor | None = None,
    generator: Generator = None,
) -> Transition:
    """A stochastic step from ``sample`` [B, ...] by ``velocity`` [B, ...], or the replay of the step to ``next``.

    Args:
        sde, eta: form and level of the noise, see ``StepTable.from_sigmas``.
        levels: of the batch.
        next: stored next state [B, ...]; None draws one, in the dtype of ``sample`` (a state that is stored in low
            precision is rounded before its density is taken).
        generator: of torch, one or one a sample; None: the global one.

    Raises:
        UsageError: both ``next`` and ``generator``, or a step without noise.
    """
    if next is not None and generator is not None:
        raise UsageError("give the next state (replay) or a generator (sampling), not both")
    pairs = zip(levels.sigma, levels.after, strict=True)
    rows = torch.tensor([sde_row(sde, *pair, second=levels.second, eta=eta) for pair in pairs], dtype=torch.float64)
    if not bool((rows[:, 2] > 0).all()):
        raise UsageError(
            f"a step of sde {sde} with eta {eta} from levels {levels.sigma} to {levels.after} has no noise"
        )
    rows = rows.expand(sample.shape[0], 4)
    x, v = sample.detach().float(), velocity.float()
    if next is None:
        noise = _randn(v, generator)
        next = flow_step(x, v.detach(), rows, noise=noise).x_next.to(sample.dtype)
    stored = next.detach().float()
    a, b, c = (column.to(x).view(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)[:3])
    return Transition(stored, flow_log_prob(x, v, stored, rows), a * x + b * v, c)


def euler(levels: Levels, sample: Tensor, velocity: Tensor) -> Tensor:
    """The deterministic step [B, ...] float32, without graph."""
    rows = torch.tensor([[1.0, b - a, 0.0, 0.0] for a, b in zip(levels.sigma, levels.after, strict=True)])
    x = sample.detach().float()
    return flow_step(x, velocity.detach().float(), rows.double().expand(x.shape[0], 4)).x_next


def _randn(like: Tensor, generator: Generator) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like.device)
    drawn = [torch.randn(like.shape[1:], generator=one, device=one.device, dtype=torch.float32) for one in generator]
    return torch.stack(drawn).to(like.device)
