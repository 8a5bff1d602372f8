"""flow_grpo's Wan path (and World-R1's): its step and its pipeline with log-probabilities, with their signatures.

    from geoalign.integrations.flow_grpo import sde_step_with_logprob, wan_pipeline_with_logprob

in place of flow_grpo's own import. Additions are keyword-only and at the end. Differences: members of a group
(``num_videos_per_prompt``) share their initial noise unless ``latents`` names it; noise is drawn by counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.flow.sampler import initial_noise
from geoalign.flow.table import StepTable, StepWindow
from geoalign.integrations.group_rollout import GroupRollout, Network, decoder_of
from geoalign.integrations.transition import euler, levels_of, take

SDE: SdeVariant = "linear"
"""Of flow_grpo's Wan path: std = sigma_1 sigma sqrt(step)."""


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
) -> tuple[Tensor, ...]:
    """One step of the SDE, or the log-probability of a stored one (``prev_sample``).

    Args:
        self: a diffusers flow scheduler whose timesteps are set.
        model_output: velocity [B, ...]. timestep: [B] or [1], of the scheduler. sample: [B, ...].
        prev_sample: stored next state. generator: of torch, for sampling.
        determistic: take the Euler step; the log-probability is that of its result under the SDE.
        return_pixel_log_prob: refused.
        return_dt_and_std_dev_t: return (.., std_dev_t, sqrt_dt) apart in place of their product.

    Returns:
        (prev_sample, log_prob [B], prev_sample_mean, std [B, 1, ...]).

    Raises:
        UsageError: ``return_pixel_log_prob``, or both ``prev_sample`` and ``generator``.
    """
    if return_pixel_log_prob:
        raise UsageError("return_pixel_log_prob: the density is reduced inside the kernel, its pixels are not kept")
    levels = levels_of(self, timestep)
    given = prev_sample if prev_sample is not None or not determistic else euler(levels, sample, model_output)
    drawn = generator if prev_sample is not None or not determistic else None
    step = take(SDE, 1.0, levels, sample, model_output, next=given, generator=drawn)
    if not return_dt_and_std_dev_t:
        return step.next, step.log_prob, step.mean, step.std
    sqrt_dt = levels.step.sqrt().to(step.std).view(-1, *[1] * (sample.dim() - 1))
    return step.next, step.log_prob, step.mean, step.std / sqrt_dt, sqrt_dt


def wan_pipeline_with_logprob(
    self: Any,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    num_videos_per_prompt: int = 1,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str = "np",
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
    callback_on_step_end: Any = None,
    callback_on_step_end_tensor_inputs: list[str] | None = None,
    max_sequence_length: int = 512,
    determistic: bool = False,
    kl_reward: float = 0.0,
    return_pixel_log_prob: bool = False,
    *,
    stochastic: Iterable[int] | None = None,
    seed: int | None = None,
    iteration: int = 0,
    group_ids: Tensor | None = None,
    rows_per_forward: int | None = None,
) -> tuple[Any, list[Tensor], list[Tensor], list[Tensor]]:
    """Videos of M prompts with G = ``num_videos_per_prompt`` members each, their states and log-probabilities.

    Args:
        self: a diffusers ``WanPipeline``. Arguments up to ``return_pixel_log_prob`` are flow_grpo's.
        latents: initial noise, [M, C, T, h, w] shared in each group or [M * G, ...]; default drawn by counter, shared.
        generator: draws ``seed`` if that is None. attention_kwargs: handed to the transformer.
        stochastic: consecutive step indices; default all, the last included, as in flow_grpo. The steps before the
            first are computed once per group.
        seed, iteration, group_ids, rows_per_forward: see ``GroupRollout``. A trainer that replays by its own forward,
            with gradients enabled, gets equal bits where its batches have the rollout's shape.

    Returns:
        (videos or ``WanPipelineOutput``, states, log-probabilities, zeros in place of the KL reward): K + 1, K and K
        tensors [M * G, ...] for the K stochastic steps, first state included. With ``determistic`` the first and the
        last state and no log-probabilities.

    Raises:
        UsageError: ``kl_reward``, pixel log-probabilities, callbacks, several generators, or gaps between the steps.
    """
    _refuse(kl_reward, return_pixel_log_prob, callback_on_step_end, generator)
    self._guidance_scale, size = guidance_scale, num_videos_per_prompt
    prompt_embeds, negative_prompt_embeds = self.encode_prompt(
        prompt=prompt,
        negative_prompt=negative_prompt,
        do_classifier_free_guidance=guidance_scale > 1.0,
        num_videos_per_prompt=1,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        max_sequence_length=max_sequence_length,
        device=self._execution_device,
    )
    conditions, device = prompt_embeds.shape[0], prompt_embeds.device
    if seed is None:
        seed = int(torch.randint(0, 2**31, (), generator=generator, device=getattr(generator, "device", None)))
    if group_ids is None:
        group_ids = torch.arange(conditions, device=device)
    if latents is None:
        latents = initial_noise(_shape(self, num_frames, height, width), seed, iteration, group_ids)
    steps = range(num_inference_steps) if stochastic is None else sorted(stochastic)
    network, table = (
        _network(self.transformer, guidance_scale, attention_kwargs),
        _table(self, num_inference_steps, steps),
    )
    shared = latents.shape[0] == conditions
    group = GroupRollout(
        network, table, size, rows_per_forward=rows_per_forward, share_prefix=shared, decode=decoder_of(self)
    )
    tensors = {"prompt": prompt_embeds}
    if guidance_scale > 1.0:
        assert negative_prompt_embeds is not None  # encode_prompt makes one
        tensors["negative"] = negative_prompt_embeds.expand(conditions, *negative_prompt_embeds.shape[1:])
    if determistic:
        final = group.sample_deterministic(tensors, latents)
        states, log_probs = [latents, final], []
    else:
        named = {"seed": seed, "iteration": iteration, "group_ids": group_ids}
        rollout = group.sample(tensors, latents=latents, **named).rollout
        final, start = rollout.final, rollout.state(0)
        states = [start.repeat_interleave(final.shape[0] // start.shape[0], 0), *rollout.x_next.unbind(0)]
        log_probs = list(rollout.log_prob.unbind(1))
    videos = final
    if output_type != "latent":
        frames = group.decoded(final).transpose(1, 2)
        videos = self.video_processor.postprocess_video(frames, output_type=output_type)
    zeros = [torch.zeros_like(log_prob) for log_prob in log_probs]
    return _output(videos) if return_dict else videos, states, log_probs, zeros


def _refuse(kl_reward: float, pixels: bool, callback: Any, generator: Any) -> None:
    if kl_reward > 0 or pixels or callback is not None or isinstance(generator, list):
        raise UsageError(
            "this wan_pipeline_with_logprob has no kl_reward (add the KL term to the loss), no return_pixel_log_prob, "
            "no callback_on_step_end (steps are shared by a group) and takes one generator"
        )


def _network(transformer: Any, guidance: float, attention_kwargs: dict[str, Any] | None) -> Network:
    def network(x: Tensor, timestep: Tensor, *, prompt: Tensor, negative: Tensor | None = None) -> Tensor:
        # The two passes are combined in the network's dtype, as in flow_grpo's trainer: its replay must agree.
        given = {"hidden_states": x.to(transformer.dtype), "timestep": timestep, "attention_kwargs": attention_kwargs}
        passes = [
            transformer(**given, encoder_hidden_states=embeds.to(transformer.dtype), return_dict=False)[0]
            for embeds in (prompt, negative)
            if embeds is not None
        ]
        return passes[0] if negative is None else passes[1] + guidance * (passes[0] - passes[1])

    return network


def _table(pipeline: Any, count: int, steps: Sequence[int]) -> StepTable:
    pipeline.scheduler.set_timesteps(count)
    grid = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
    table = StepTable.from_sigmas(*grid, sde=SDE, eta=1.0, stochastic=steps)
    if not isinstance(table.window, StepWindow):
        raise UsageError(f"stochastic steps {list(steps)} must follow each other: flow_grpo's lists of states do")
    return table


def _shape(pipeline: Any, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    space = pipeline.vae_scale_factor_spatial
    channels = pipeline.transformer.config.in_channels
    return channels, (frames - 1) // pipeline.vae_scale_factor_temporal + 1, height // space, width // space


def _output(videos: Any) -> Any:
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

    return WanPipelineOutput(frames=videos)
