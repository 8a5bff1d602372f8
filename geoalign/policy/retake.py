"""One retake, from conditions to videos: what ``sample``, ``evaluate`` and the evaluations of a run all do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.errors import RunError, argument
from geoalign.flow.policy import Velocity
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.types import RetakeBatch
from geoalign_kernels import streams


@torch.no_grad()
def retake(
    policy: RetakePolicy,
    batch: RetakeBatch,
    flow: FlowConfig,
    *,
    seed: int,
    stream: int = streams.INITIAL_NOISE,
    rows: Tensor | None = None,
    on_pass: Callable[[int], object] = lambda passes: None,
    on_decode: Callable[[], object] = lambda: None,
    strict: bool = False,
) -> Tensor:
    """Sample deterministically and decode: ``[B, F, 3, H, W]`` in [-1, 1], on the policy's device.

    Args:
        policy: model, codec and guidance.
        batch: B conditions, on any device.
        flow: sampler settings; its stochastic part is not used.
        seed, stream: name the initial noise, which is a function of both and of the row.
        rows: ``[B]`` int64, which rows of a larger batch these are; default 0..B-1.
        on_pass: told after each step how many passes of the network it took (two under guidance).
        on_decode: told when the last step is done and decoding begins.
        strict: raise for values that are not finite, which are returned otherwise (an evaluation counts them).

    Raises:
        UserError: the batch lacks what the model reads (:meth:`RetakePolicy.condition`).
        RunError: with ``strict``, the model or its codec gave NaN or infinity.
    """

    def velocity(x: Tensor, timestep: Tensor, rows: Precomputed) -> Velocity:
        answer = policy.velocity(x, timestep, rows)
        on_pass(answer.passes)
        return answer

    precomputed = policy.precompute(policy.condition(batch))
    rows = torch.arange(len(batch)) if rows is None else rows
    noise = initial_noise(policy.latent_shape(batch), seed, 0, rows.to(policy.device), stream=stream)
    latents = FlowSampler(build_step_table(flow)).sample(velocity, precomputed, noise)
    if strict:
        refuse_non_finite(latents, "the model")
    on_decode()
    video = policy.decode(latents, batch.source.video)
    if strict:
        refuse_non_finite(video, "the autoencoder")
    return video


def refuse_non_finite(values: Tensor, maker: str) -> None:
    """Raise RunError, which names the ``maker``, for values that are not finite."""
    if not torch.isfinite(values).all():
        share = float((~torch.isfinite(values)).float().mean())
        raise RunError(
            f"{maker} gave NaN or infinity in {share:.0%} of its values, nothing is written; are its weights intact, "
            f"and the cameras, {argument('guidance')} and {argument('shift')} of a usual size?"
        )
