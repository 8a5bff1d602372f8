"""Flow-Factory: an accelerator for its ``shared`` slot, and the step of its SDE schedulers on the project's ops.

The accelerator runs the same fused blocks in rollout and training forward, so the ratio stays what it was. Its class
attributes and methods are those that Flow-Factory's base class asks for; it need not derive from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.integrations.transition import Generator, Levels, euler, levels_of, take
from geoalign_kernels import Handle, accelerate

SDES: dict[str, SdeVariant] = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps"}
FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")


class FusedKernels:
    """``acceleration.shared``: the fused blocks on the transformers of an adapter, for rollout and training alike.

    Args:
        **params: of the configuration: ``level``, ``attention`` and ``compile`` of ``geoalign_kernels.accelerate``.
    """

    stage: ClassVar[str] = "both"
    safety: ClassVar[str] = "lossless"
    """Of train and inference to each other, which is what the slot asks; see ``level`` for the bits of the outputs."""

    def __init__(self, **params: Any) -> None:
        self.params = params
        self.handles: list[Handle] = []

    def setup(self, adapter: Any) -> None:
        """Accelerate ``adapter.transformer`` and, where there is one, ``adapter.transformer_2``."""
        for name in ("transformer", "transformer_2"):
            network = getattr(adapter, name, None)
            if network is not None:
                self.handles.append(accelerate(network, **self.params))

    @contextmanager
    def rollout_context(self, adapter: Any) -> Iterator[None]:
        """Nothing of its own: the blocks are fused in both phases."""
        yield


@dataclass(slots=True)
class StepOutput:
    """Fields of Flow-Factory's ``SDESchedulerOutput``; what was not asked for is None."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None


def use_fused_step(scheduler: Any) -> None:
    """Put ``step`` into an SDE scheduler of Flow-Factory: outputs keep their names, its settings are read as before."""
    scheduler.step = MethodType(step, scheduler)


def step(
    scheduler: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Generator = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = FIELDS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> StepOutput | tuple[Tensor | None, ...]:
    """One step of an SDE scheduler, or the replay of one.

    Args:
        scheduler: with ``sigmas``, ``index_for_timestep``, ``dynamics_type`` and ``get_noise_level_for_sigma``.
        noise_pred: velocity [B, ...]. timestep: of the scheduler, a number, [] or [B]. latents: [B, ...].
        next_latents: stored next state; None samples one. timestep_next: 1000 sigma' in place of the grid's node.
        generator: of torch, for sampling. noise_level: one for the batch; None asks the scheduler; 0: Euler step.
        compute_log_prob: False leaves it out. return_dict: False returns the fields of ``return_kwargs`` as a tuple.
        dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE". sigma_max: level of the second node.

    Raises:
        UsageError: unknown dynamics, or several noise levels in one batch.
    """
    dynamics = dynamics_type or scheduler.dynamics_type
    if dynamics not in (*SDES, "ODE"):
        raise UsageError(f"dynamics_type '{dynamics}': choose one of {', '.join(SDES)}, ODE")
    time = torch.as_tensor(timestep)
    levels = levels_of(scheduler, time) if timestep_next is None else _given_levels(scheduler, time, timestep_next)
    if sigma_max is not None:
        levels = levels._replace(second=float(sigma_max))
    eta = 0.0 if dynamics == "ODE" else _noise_level(scheduler, levels, noise_level)
    dt = -levels.step.to(latents.device, torch.float32).view(-1, *[1] * (latents.dim() - 1))
    if eta == 0.0:
        after = euler(levels, latents, noise_pred)
        following = after if next_latents is None else next_latents.float()
        output = StepOutput(following, after, torch.zeros_like(dt), dt, None, noise_pred)
        if compute_log_prob:
            output.log_prob = torch.zeros(latents.shape[0], device=latents.device)  # as Flow-Factory: no density
    else:
        taken = take(SDES[dynamics], eta, levels, latents, noise_pred, next=next_latents, generator=generator)
        # Flow-Factory's std_dev_t is the level of Flow-SDE, and the deviation of the whole step elsewhere.
        std = taken.std / (-dt).sqrt() if dynamics == "Flow-SDE" else taken.std
        density = taken.log_prob if compute_log_prob else None
        output = StepOutput(taken.next, taken.mean, std, dt, density, noise_pred)
    fields = [getattr(output, name) if name in return_kwargs else None for name in FIELDS]
    return StepOutput(*fields) if return_dict else tuple(getattr(output, name) for name in return_kwargs)


def _given_levels(scheduler: Any, timestep: Tensor, timestep_next: float | Tensor) -> Levels:
    after = torch.as_tensor(timestep_next)
    sigma, following = (t.double().reshape(-1).div(1000.0).tolist() for t in (timestep, after))
    return Levels(sigma, following, float(scheduler.sigmas[1]))


def _noise_level(scheduler: Any, levels: Levels, noise_level: float | Tensor | None) -> float:
    if noise_level is None:
        noise_level = scheduler.get_noise_level_for_sigma(torch.tensor(levels.sigma, dtype=scheduler.sigmas.dtype))
    found = torch.as_tensor(noise_level, dtype=torch.float64).unique()
    if found.numel() != 1:
        raise UsageError(f"one batch holds the noise levels {found.tolist()}: step samples of one level at a time")
    return float(found)
