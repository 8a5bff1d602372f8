"""verl-omni's training step: ``DiffusionModelBase.forward_and_sample_previous_step`` on the project's step ops.

Assign it to a model class as a static method: the same arguments without ``cls``. What builds the model's inputs stays
verl-omni's own. One difference: the log-probability of "cps" is the Gaussian density.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.integrations.transition import levels_of, take
from geoalign_kernels import exact_only

SDES: dict[str, SdeVariant] = {"sde": "flow", "cps": "cps", "dance_sde": "dance"}


def forward_and_sample_previous_step(
    module: Any,
    scheduler: Any,
    model_config: Any,
    model_inputs: Mapping[str, Any],
    negative_model_inputs: Mapping[str, Any] | None,
    scheduler_inputs: Mapping[str, Tensor],
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replay one stored transition under the network.

    Args:
        module: the network; ``module(**model_inputs)[0]`` is the velocity [B, ...].
        scheduler: with ``sigmas`` and ``index_for_timestep``.
        model_config: its ``algo.noise_level``, ``algo.sde_type`` and ``pipeline.guidance_scale`` are read.
        model_inputs, negative_model_inputs: of the two passes; the second is used with guidance above 1.
        scheduler_inputs: ``all_latents`` [B, T + 1, ...] and ``all_timesteps`` [B, T].
        step: of the trajectory, 0..T-1.

    Returns:
        (log_prob [B], prev_sample_mean [B, ...], std_dev_t, sqrt_dt), the last two [B, 1, ...]: their product is the
        standard deviation of the step ("cps": std_dev_t alone is).

    Raises:
        UsageError: an unknown ``sde_type``, or guidance without negative inputs.
    """
    name, guidance = model_config.algo.sde_type, model_config.pipeline.guidance_scale
    if name not in SDES:
        raise UsageError(f"sde_type '{name}': choose one of {', '.join(SDES)}")
    if guidance > 1.0 and not negative_model_inputs:
        raise UsageError(f"guidance_scale {guidance} needs negative_model_inputs")
    latents, timesteps = scheduler_inputs["all_latents"], scheduler_inputs["all_timesteps"]
    with exact_only():
        velocity = module(**model_inputs)[0]
        if guidance > 1.0:
            negative = module(**negative_model_inputs)[0]
            velocity = negative + guidance * (velocity - negative)
    levels = levels_of(scheduler, timesteps[:, step])
    noise = SDES[name], model_config.algo.noise_level
    taken = take(*noise, levels, latents[:, step], velocity, next=latents[:, step + 1])
    sqrt_dt = levels.step.sqrt().to(taken.std).view(-1, *[1] * (velocity.dim() - 1))
    return taken.log_prob, taken.mean, taken.std if name == "cps" else taken.std / sqrt_dt, sqrt_dt
