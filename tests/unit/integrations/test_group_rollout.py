"""GroupRollout over tiny diffusers pipelines: against the pipeline's own loop, replay, counts, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from dropin_models import LATENT, wan
from torch import Tensor
from torch.distributions import Normal

from geoalign.errors import UsageError
from geoalign.flow.rollout import ForwardCount
from geoalign.flow.table import StepTable
from geoalign.integrations import GroupRollout
from geoalign_kernels import NoiseKey, accelerate, attention, philox_normal

STEPS, GROUP, IDS = 6, 3, torch.tensor([4, 11])


def scheduler(kind: str = "unipc") -> Any:
    if kind == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def pipeline(
    kind: str = "t2v", grid: str = "unipc", dtype: torch.dtype = torch.float32, vae: Any = None
) -> WanPipeline:
    return WanPipeline(None, None, vae, scheduler(grid), wan(kind, dtype))  # type: ignore[arg-type]


def prompts(count: int = 2) -> dict[str, Tensor]:
    return {"prompt_embeds": torch.randn(count, 7, 20, generator=torch.Generator().manual_seed(count))}


def test_deterministic_steps_are_those_of_the_pipelines_own_loop() -> None:
    """One stochastic step, the last: all before it must be WanPipeline's, run sample by sample with guidance."""
    pipe = pipeline(grid="euler")
    group = GroupRollout.from_pipeline(pipe, STEPS, GROUP, stochastic={STEPS - 1}, guidance=4.0)
    samples = group.sample(prompts(), negative=prompts(1), shape=LATENT, seed=2, group_ids=IDS)
    start = philox_normal(LATENT, NoiseKey(2, 0, IDS, 0, 0, 1))
    seen = []

    def keep(pipe: WanPipeline, step: int, timestep: Tensor, values: dict) -> dict:
        seen.append(values["latents"].clone())
        return {}

    pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = 8, 4
    pipe(
        prompt_embeds=prompts()["prompt_embeds"], negative_prompt_embeds=prompts(1)["prompt_embeds"].repeat(2, 1, 1),
        latents=start, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        height=48, width=64, num_frames=9, callback_on_step_end=keep,
    )  # fmt: skip
    torch.testing.assert_close(samples.rollout.x_start, seen[STEPS - 2], rtol=0, atol=2e-5)
    assert samples.rollout.forwards == ForwardCount(prefix=2 * 2 * (STEPS - 1), window=2 * 2, tail=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("t2v", torch.float32), ("t2v", torch.bfloat16), ("14b", torch.float32)])
def test_replay_equals_rollout_bitwise_with_guidance_and_gradients(kind: str, dtype: torch.dtype, fused: bool) -> None:
    pipe = pipeline(kind, dtype=dtype)
    if fused:
        accelerate(pipe.transformer)
    group = GroupRollout.from_pipeline(pipe, STEPS, GROUP, stochastic={1, 3}, guidance=3.0, rows_per_forward=2)
    samples = group.sample(prompts(), negative=prompts(1), shape=LATENT, iteration=5)
    assert group.log_prob_diff(samples) == 0.0
    for position in range(2):
        for rows in group.replay_batches(samples, position):
            step = group.replay(samples, position, rows)
            assert torch.equal(step.log_prob.detach(), samples.log_prob[rows, position]) and step.log_prob.requires_grad
    group.replay(samples, 1).log_prob.sum().backward()
    assert all(p.grad is not None for p in pipe.transformer.blocks.parameters())
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(0.01)
    assert group.log_prob_diff(samples) > 0


def test_log_probabilities_equal_a_float64_density() -> None:
    pipe = pipeline()
    group = GroupRollout.from_pipeline(pipe, STEPS, GROUP, sde="linear", eta=1.0, stochastic={2, 4})
    samples = group.sample(prompts(), shape=LATENT)
    sigmas = [float(value) for value in pipe.scheduler.sigmas]
    for position, k in enumerate((2, 4)):
        sigma, after = sigmas[k], sigmas[k + 1]
        state = samples.rollout.state(position)
        x = state.repeat_interleave(GROUP * 2 // state.shape[0], 0)
        embeds = prompts()["prompt_embeds"].repeat_interleave(GROUP, 0)
        t = pipe.scheduler.timesteps[k].expand(GROUP * 2).float()
        with torch.no_grad():
            v = pipe.transformer(x, t, embeds, return_dict=False)[0].double()
        level = sigmas[1] * sigma
        drift = v + level**2 / (2 * sigma) * (x.double() + (1 - sigma) * v)
        density = Normal(x.double() - (sigma - after) * drift, level * (sigma - after) ** 0.5)
        exact = density.log_prob(samples.rollout.x_next[position].double()).flatten(1).mean(1)
        torch.testing.assert_close(samples.log_prob[:, position].double(), exact, rtol=0, atol=2e-5)


def test_sharing_splitting_and_ranks_change_nothing_but_the_count() -> None:
    pipe, settings = pipeline(), {"stochastic": {2}}
    whole = GroupRollout.from_pipeline(pipe, STEPS, GROUP, rows_per_forward=1, **settings)
    first = whole.sample(prompts(), shape=LATENT, group_ids=IDS)
    apart = GroupRollout.from_pipeline(pipe, STEPS, GROUP, rows_per_forward=1, share_prefix=False, **settings)
    second = apart.sample(prompts(), shape=LATENT, group_ids=IDS)
    assert torch.equal(first.latents, second.latents) and torch.equal(first.log_prob, second.log_prob)
    assert (
        first.rollout.forwards.total == 2 * (2 + 1 + GROUP * 3) and second.rollout.forwards.total == 2 * GROUP * STEPS
    )
    alone = {"prompt_embeds": prompts()["prompt_embeds"][1:]}
    other = GroupRollout.from_pipeline(pipe, STEPS, 1, rows_per_forward=1, **settings).sample(
        alone, shape=LATENT, group_ids=IDS[1:], member_ids=torch.tensor([2])
    )
    assert torch.equal(other.latents[0], first.latents[-1])


def test_any_velocity_with_any_tensors_and_a_fast_network_outside_the_window() -> None:
    calls: list[str] = []

    def network(name: str, gain: float) -> Callable[..., Tensor]:
        def velocity(x: Tensor, timestep: Tensor, *, bias: Tensor, text: Tensor) -> Tensor:
            calls.append(name)
            return gain * x + bias.view(-1, 1) + text.mean(1, keepdim=True)

        return velocity

    table = StepTable.from_sigmas([1.0, 0.7, 0.4, 0.0], [1000.0, 700.0, 400.0], stochastic={1})
    tensors = {"bias": torch.tensor([0.5, -1.0]), "text": torch.ones(2, 3)}
    group = GroupRollout(network("exact", 1.0), table, 2, fast=network("fast", 0.9))
    samples = group.sample(tensors, shape=(8,))
    assert calls == ["exact", "exact", "fast"]
    assert group.log_prob_diff(samples) == 0.0 and calls[3:] == ["exact"]


def rounding(x: Tensor, timestep: Tensor, *, gain: Tensor) -> Tensor:
    """A velocity that rounds once more without gradients, as a compiler may that fuses another graph."""
    if not torch.is_grad_enabled():
        x = x.to(torch.bfloat16).to(x.dtype)
    return gain.view(-1, 1) * x


def traced(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A graph for each gradient mode, run as it is: no compiler rounds here but ``rounding`` itself."""
    torch._dynamo.reset()
    return torch.compile(network, backend="eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [lambda network: network, traced], ids=["eager", "compiled"])
def test_a_rollout_whose_graph_is_not_the_learners_is_caught_and_ours_is_the_learners(
    compiled: Callable[..., Callable[..., Tensor]],
) -> None:
    """Whatever the caller's mode is in rollout and check: the replay is the learner's, with gradients."""
    table = StepTable.from_sigmas([1.0, 0.7, 0.4, 0.0], [1000.0, 700.0, 400.0], stochastic={0, 1})
    group, tensors = GroupRollout(compiled(rounding), table, 2), {"gain": torch.tensor([0.5, 1.5])}
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            samples = group.sample(tensors, shape=(64,))
            assert not samples.log_prob.requires_grad and not samples.latents.requires_grad
            assert group.log_prob_diff(samples) == 0.0
    for position in range(2):
        assert torch.equal(group.replay(samples, position).log_prob, samples.log_prob[:, position])
    group._sampler = replace(group._sampler, window_grad=False)
    without = group.sample(tensors, shape=(64,))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert group.log_prob_diff(without) > 0.0
    with torch.inference_mode(), pytest.raises(UsageError, match=r"use torch\.no_grad"):
        GroupRollout(rounding, table, 2).sample(tensors, shape=(64,))


def test_quantised_attention_is_refused_in_the_window_only() -> None:
    def velocity(x: Tensor, timestep: Tensor, *, text: Tensor) -> Tensor:
        q = x.view(-1, 2, 1, 32)
        return attention(q, q, q, mode="int8").out.view_as(x)

    table = StepTable.from_sigmas([1.0, 0.5, 0.0], [1000.0, 500.0], stochastic={0})
    with pytest.raises(RuntimeError, match="SDE window"):
        GroupRollout(velocity, table, 2).sample({"text": torch.zeros(1)}, shape=(64,))


def test_image_to_video_takes_its_condition_channels() -> None:
    torch.manual_seed(0)
    pipe = pipeline("i2v")
    wide = torch.nn.Conv3d(6, 48, (1, 2, 2), (1, 2, 2))
    pipe.transformer.patch_embedding = wide
    tensors = {
        "prompt_embeds": torch.randn(2, 512, 20), "image_embeds": torch.randn(2, 257, 20),
        "condition": torch.randn(2, 2, *LATENT[1:]),
    }  # fmt: skip
    group = GroupRollout.from_pipeline(pipe, STEPS, 2, stochastic={3})
    samples = group.sample(tensors, shape=LATENT)
    assert group.log_prob_diff(samples) == 0.0
    changed = group.sample({**tensors, "condition": 2 * tensors["condition"]}, shape=LATENT)
    assert not torch.equal(changed.latents, samples.latents)


def test_videos_are_what_the_pipeline_decodes() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipe = pipeline(vae=vae)
    group = GroupRollout.from_pipeline(pipe, STEPS, 2, stochastic={3})
    samples = group.sample(prompts(1), shape=LATENT)
    video = group.videos(samples, slice(1, 2))
    assert video.shape == (1, 9, 3, 48, 64)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        exact = vae.decode(samples.latents[1:2] * std + mean, return_dict=False)[0]
    torch.testing.assert_close(video, exact.transpose(1, 2), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    pipe = pipeline()
    group = GroupRollout.from_pipeline(pipe, STEPS, 2)
    assert group.table.window is not None and list(group.table.window.steps) == list(range(STEPS - 1))
    for wrong, message in (
        ({"tensors": {}}, "one row per condition"),
        ({"tensors": {**prompts(2), "b": torch.zeros(3)}}, "one row per condition"),
        ({"negative": {"other": torch.zeros(1)}}, "must replace some of"),
        ({"negative": prompts(3)}, "with 1 or 2 rows"),
        ({"group_ids": torch.arange(3)}, "3 group_ids for tensors of 2"),
        ({"latents": torch.zeros(2, *LATENT)}, "shape of one sample"),
    ):
        with pytest.raises(UsageError, match=message):
            group.sample(**{"tensors": prompts(), "shape": LATENT, **wrong})
    with pytest.raises(UsageError, match="no decoder"):
        group.videos(group.sample(prompts(), shape=LATENT))
    pipe.register_modules(transformer_2=wan())
    with pytest.raises(UsageError, match="one transformer"):
        GroupRollout.from_pipeline(pipe, STEPS, 2)
