"""Others' signatures: what each computes against its formula in float64, replay bitwise, agreement between them."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from dropin_models import LATENT, error, inputs, output, wan
from torch import Tensor
from torch.distributions import Normal

from geoalign.errors import UsageError
from geoalign.integrations import flow_factory, flow_grpo, unirl, verl_omni

SHAPE = (3, 2, 4)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    found = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found.set_timesteps(8)
    return found


def data(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(state, velocity) of four samples."""
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(4, *SHAPE, generator=generator) for _ in range(2))
    return x.to(dtype), v


STEPS = torch.tensor([0, 3, 3, 6])


def exact(form: str, eta: float, x: Tensor, v: Tensor, grid: Tensor, steps: Tensor = STEPS) -> tuple[Tensor, Tensor]:
    """(mean, std of the whole step [B, 1, ...]) in float64, from clean latent, noise and score."""
    wide = (-1, *[1] * (x.dim() - 1))
    sigma, after, second = grid.double()[steps].view(wide), grid.double()[steps + 1].view(wide), float(grid[1])
    x, v = x.double(), v.double()
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if form == "cps":
        std = after * math.sin(eta * math.pi / 2)
        return (1 - after) * clean + (after**2 - std**2).sqrt() * noise, std
    level = {
        "flow": eta * (sigma / (1 - torch.where(sigma == 1, torch.full_like(sigma, second), sigma))).sqrt(),
        "dance": torch.full_like(sigma, eta),
        "linear": second * sigma * eta,
    }[form]
    delta = sigma - after
    return x - delta * (v + level**2 / 2 * noise / sigma), level * delta.sqrt()


def density(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    return Normal(mean, std).log_prob(x.double()).flatten(1).mean(1)


def assert_step(got: tuple[Tensor, Tensor, Tensor], form: str, eta: float, x: Tensor, v: Tensor) -> None:
    """(next, log_prob, mean) of a sampled step."""
    mean, std = exact(form, eta, x, v, scheduler().sigmas)
    torch.testing.assert_close(got[2].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), density(mean, std, got[0]), rtol=0, atol=2e-4)
    z = (got[0].double() - mean) / std
    assert float(z.abs().max()) < 5 and 0.5 < float(z.std()) < 1.5  # one draw a component


def flow_grpo_step(x: Tensor, v: Tensor, after: Tensor | None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    grid = scheduler()
    return flow_grpo.sde_step_with_logprob(grid, v, grid.timesteps[STEPS], x, prev_sample=after, **more)[:3]


def flow_factory_step(dynamics: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, v: Tensor, after: Tensor | None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        grid: Any = scheduler()
        grid.dynamics_type = dynamics
        flow_factory.use_fused_step(grid)
        out = grid.step(v, grid.timesteps[STEPS], x, next_latents=after, noise_level=0.6, **more)
        return out.next_latents, out.log_prob, out.next_latents_mean

    return run


def unirl_step(name: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, v: Tensor, after: Tensor | None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        grid = scheduler().sigmas
        pair = grid[STEPS], grid[STEPS + 1]
        eta = 1.0 if name == "flash" else 0.6
        step = unirl.Strategy(name).denoise(v, x, *pair, eta=eta, prev_sample=after, sigma_max=float(grid[1]), **more)
        return step  # type: ignore[return-value]

    return run


def verl_step(name: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, v: Tensor, after: Tensor | None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        grid = scheduler()
        if after is None:  # it replays only: the state to replay comes from the same step of UniRL
            after = unirl_step({"sde": "flow", "cps": "cps", "dance_sde": "dance"}[name])(x, v, None, **more)[0]
        config = SimpleNamespace(
            algo=SimpleNamespace(noise_level=0.6, sde_type=name), pipeline=SimpleNamespace(guidance_scale=1.0)
        )
        stored = {"all_latents": torch.stack([x, after], 1), "all_timesteps": grid.timesteps[STEPS][:, None]}
        log_prob, mean, std, sqrt_dt = verl_omni.forward_and_sample_previous_step(
            lambda velocity: (velocity,), grid, config, {"velocity": v}, None, stored, 0
        )
        whole = std if name == "cps" else std * sqrt_dt
        form = {"sde": "flow", "cps": "cps", "dance_sde": "dance"}[name]
        torch.testing.assert_close(whole.double(), exact(form, 0.6, x, v, grid.sigmas)[1], rtol=1e-5, atol=1e-6)
        return after, log_prob, mean

    return run


CASES = {
    "flow_grpo": (flow_grpo_step, "linear", 1.0),
    "flow_factory flow": (flow_factory_step("Flow-SDE"), "flow", 0.6),
    "flow_factory dance": (flow_factory_step("Dance-SDE"), "dance", 0.6),
    "flow_factory cps": (flow_factory_step("CPS"), "cps", 0.6),
    "unirl flow": (unirl_step("flow"), "flow", 0.6),
    "unirl dance": (unirl_step("dance"), "dance", 0.6),
    "unirl cps": (unirl_step("cps"), "cps", 0.6),
    "unirl flash": (unirl_step("flash"), "linear", 1.0),
    "verl sde": (verl_step("sde"), "flow", 0.6),
    "verl cps": (verl_step("cps"), "cps", 0.6),
    "verl dance": (verl_step("dance_sde"), "dance", 0.6),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_published_one_and_its_replay_equal_bit_for_bit(case: str) -> None:
    run, form, eta = CASES[case]
    x, v = data()
    sampled = run(x, v, None, generator=torch.Generator().manual_seed(1))
    assert_step(sampled, form, eta, x, v)
    leaf = v.clone().requires_grad_()
    replayed = run(x, leaf, sampled[0])
    assert torch.equal(replayed[1], sampled[1]) and torch.equal(replayed[2], sampled[2])
    replayed[1].sum().backward()
    wide = v.double().requires_grad_()
    density(*exact(form, eta, x, wide, scheduler().sigmas), sampled[0]).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["flow_grpo", "flow_factory flow", "unirl flow"])
def test_states_in_low_precision_are_rounded_before_their_density_is_taken(case: str) -> None:
    run = CASES[case][0]
    x, v = data(dtype=torch.bfloat16)
    after, log_prob, _ = run(x, v, None)
    assert torch.equal(after, after.bfloat16().float())
    assert torch.equal(run(x, v, after.bfloat16())[1], log_prob)


def test_forms_that_several_projects_have_are_one() -> None:
    x, v = data()
    draw = lambda name: CASES[name][0](x, v, None, generator=torch.Generator().manual_seed(2))  # noqa: E731
    for first, second in (
        ("flow_factory flow", "unirl flow"),
        ("flow_factory cps", "verl cps"),
        ("flow_grpo", "unirl flash"),
    ):
        for got, want in zip(draw(first), draw(second), strict=True):
            assert torch.equal(got, want), (first, second)


def test_deterministic_steps() -> None:
    x, v = data()
    grid = scheduler()
    wide = (-1, *[1] * len(SHAPE))
    euler = x + (grid.sigmas[STEPS + 1] - grid.sigmas[STEPS]).view(wide) * v
    after, log_prob, _, std = flow_grpo.sde_step_with_logprob(grid, v, grid.timesteps[STEPS], x, determistic=True)
    torch.testing.assert_close(after, euler)
    torch.testing.assert_close(
        log_prob.double(), density(*exact("linear", 1.0, x, v, grid.sigmas), after), rtol=0, atol=2e-4
    )
    parts = flow_grpo.sde_step_with_logprob(
        grid, v, grid.timesteps[STEPS], x, prev_sample=after, return_dt_and_std_dev_t=True
    )
    torch.testing.assert_close(parts[3] * parts[4], std)
    torch.testing.assert_close(parts[4].flatten() ** 2, grid.sigmas[STEPS] - grid.sigmas[STEPS + 1])
    assert unirl.Strategy().denoise(v, x, grid.sigmas[STEPS], grid.sigmas[STEPS + 1], eta=0.0)[1] is None
    grid.dynamics_type = "ODE"  # type: ignore[attr-defined]
    out = flow_factory.step(grid, v, grid.timesteps[STEPS], x)
    torch.testing.assert_close(out.next_latents, euler)  # type: ignore[union-attr]


def test_flow_factory_reads_its_scheduler_and_returns_what_is_asked_for() -> None:
    x, v = data()
    grid: Any = scheduler()
    grid.dynamics_type = "Flow-SDE"
    asked: list[Tensor] = []
    grid.get_noise_level_for_sigma = lambda sigma: asked.append(sigma) or torch.full_like(sigma, 0.6)
    flow_factory.use_fused_step(grid)
    t = grid.timesteps[3]
    whole = grid.step(v, t, x, generator=torch.Generator().manual_seed(0))
    pair = grid.step(
        v, t, x, next_latents=whole.next_latents, timestep_next=1000 * grid.sigmas[4], return_dict=False,
        return_kwargs=["log_prob", "dt"],
    )  # fmt: skip
    assert len(asked) == 2 and float(asked[0][0]) == float(grid.sigmas[3])
    torch.testing.assert_close(pair[0], whole.log_prob, rtol=0, atol=1e-5)  # levels by 1000 sigma, rounded
    assert grid.step(v, t, x, compute_log_prob=False, return_kwargs=["next_latents"]).log_prob is None
    grid.get_noise_level_for_sigma = lambda sigma: torch.tensor([0.6, 0.0])
    with pytest.raises(UsageError, match="noise levels"):
        grid.step(v, t, x)


def test_flow_factorys_shared_slot_fuses_both_transformers() -> None:
    adapter = SimpleNamespace(transformer=wan(), transformer_2=wan(seed=1))
    plugin = flow_factory.FusedKernels(level="rounding")
    assert (plugin.stage, plugin.safety) == ("both", "lossless")
    plugin.setup(adapter)
    with plugin.rollout_context(adapter):
        rollout = output(adapter.transformer, inputs())
    assert torch.equal(output(adapter.transformer, inputs()), rollout)
    assert error(rollout, output(wan(), inputs())) < 1e-6 and len(plugin.handles) == 2


def test_verl_guidance_and_refusals() -> None:
    x, v = data()
    grid = scheduler()
    config = SimpleNamespace(
        algo=SimpleNamespace(noise_level=0.6, sde_type="sde"), pipeline=SimpleNamespace(guidance_scale=3.0)
    )
    stored = {"all_latents": torch.stack([x, x + 0.1], 1), "all_timesteps": grid.timesteps[STEPS][:, None]}
    run = verl_omni.forward_and_sample_previous_step
    network = lambda velocity: (velocity,)  # noqa: E731
    log_prob, *_ = run(network, grid, config, {"velocity": v}, {"velocity": 0.5 * v}, stored, 0)
    combined = density(*exact("flow", 0.6, x, 0.5 * v + 3.0 * 0.5 * v, grid.sigmas), x + 0.1)
    torch.testing.assert_close(log_prob.double(), combined, rtol=1e-5, atol=2e-4)
    with pytest.raises(UsageError, match="negative_model_inputs"):
        run(network, grid, config, {"velocity": v}, None, stored, 0)
    config.algo.sde_type = "ode"
    with pytest.raises(UsageError, match="sde_type 'ode'"):
        run(network, grid, config, {"velocity": v}, {"velocity": v}, stored, 0)


def pipeline(vae: Any = None, dtype: torch.dtype = torch.float32) -> WanPipeline:
    grid = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae, grid, wan("t2v", dtype))  # type: ignore[arg-type]
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    return pipe


def call(pipe: WanPipeline, prompts: int, **more: Any) -> Any:
    embeds = torch.randn(prompts, 7, 20, generator=torch.Generator().manual_seed(8))
    size = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 6}
    return flow_grpo.wan_pipeline_with_logprob(
        pipe, prompt_embeds=embeds, negative_prompt_embeds=-embeds[:1].repeat(prompts, 1, 1), **size,
        **{"output_type": "latent", "return_dict": False, **more},
    )  # fmt: skip


def rounding_without_gradients(_: Any, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A network that rounds once more without gradients, as a compiler may that fuses another graph."""
    if torch.is_grad_enabled():
        return args, given
    x = given["hidden_states"]
    return args, given | {"hidden_states": x.to(torch.float8_e4m3fn).to(x.dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainers_own_replay_of_the_pipeline_gives_a_ratio_of_one(dtype: torch.dtype) -> None:
    """As flow_grpo's trainer: the network on stored states in the rollout's batch shape, its guidance, its step."""
    pipe = pipeline(dtype=dtype)
    pipe.transformer.register_forward_pre_hook(rounding_without_gradients, with_kwargs=True)
    with torch.no_grad():  # flow_grpo's loop samples so, and its learner replays with gradients
        _, states, log_probs, kl = call(pipe, 2, guidance_scale=4.0, seed=3)
    assert len(states) == 7 and len(log_probs) == 6 and all(not bool(value.any()) for value in kl)
    embeds = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(8)).to(dtype)
    for k, t in enumerate(pipe.scheduler.timesteps):
        given = {"hidden_states": states[k].to(dtype), "timestep": t.expand(2), "return_dict": False}
        positive = pipe.transformer(**given, encoder_hidden_states=embeds)[0]
        negative = pipe.transformer(**given, encoder_hidden_states=-embeds[:1].repeat(2, 1, 1))[0]
        v = negative + 4.0 * (positive - negative)
        step = flow_grpo.sde_step_with_logprob(
            pipe.scheduler, v.float(), t.unsqueeze(0), states[k].float(), prev_sample=states[k + 1].float()
        )
        assert torch.equal(step[1], log_probs[k])
        grid = pipe.scheduler.sigmas
        truth = density(*exact("linear", 1.0, states[k], v, grid, torch.tensor([k])), states[k + 1])
        torch.testing.assert_close(step[1].double(), truth, rtol=1e-5, atol=5e-4)


def test_groups_share_the_prefix_of_a_window() -> None:
    pipe, calls = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    shared = call(pipe, 2, num_videos_per_prompt=3, guidance_scale=1.0, stochastic=[2, 3], seed=5, rows_per_forward=1)
    assert [len(part) for part in shared[1:]] == [3, 2, 2] and shared[0].shape == (6, *LATENT)
    assert len(calls) == 2 * (2 + 1 + 3 * 3)
    start = shared[1][0].view(2, 3, -1)
    assert torch.equal(start[:, 0], start[:, 1]) and not torch.equal(shared[0][0], shared[0][1])
    apart = torch.randn(6, *LATENT)
    assert call(pipe, 2, num_videos_per_prompt=3, stochastic=[2, 3], latents=apart)[1][0].unique(dim=0).shape[0] == 6


def test_seeds_come_from_the_generator_and_evaluation_is_deterministic() -> None:
    pipe = pipeline()
    draw = lambda seed: call(pipe, 1, generator=torch.Generator().manual_seed(seed), stochastic=[4])[0]  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    noise = torch.randn(1, *LATENT)
    videos, states, log_probs, _ = call(pipe, 1, determistic=True, latents=noise, guidance_scale=4.0)
    assert torch.equal(states[0], noise) and torch.equal(states[1], videos) and not log_probs
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = call(pipe, 1, determistic=True, latents=noise, guidance_scale=4.0)[0]
    embeds = torch.randn(1, 7, 20, generator=torch.Generator().manual_seed(8))
    theirs = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=-embeds, latents=noise, guidance_scale=4.0, output_type="latent",
        height=48, width=64, num_frames=9, num_inference_steps=6,
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_videos_are_postprocessed_as_the_pipeline_does() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    frames = call(pipeline(vae), 1, stochastic=[4], output_type="pt", return_dict=True)[0].frames
    assert frames.shape == (1, 9, 3, 48, 64) and float(frames.min()) >= 0 and float(frames.max()) <= 1


@pytest.mark.parametrize(
    "asked",
    [{"kl_reward": 0.1}, {"return_pixel_log_prob": True}, {"callback_on_step_end": print}, {"stochastic": [1, 3]}],
)
def test_what_flow_grpos_pipeline_does_not_offer_is_refused(asked: dict) -> None:
    with pytest.raises(UsageError):
        call(pipeline(), 1, **asked)


def test_other_refusals() -> None:
    x, v = data()
    with pytest.raises(UsageError, match="strategy 'sde'"):
        unirl.Strategy("sde")
    with pytest.raises(UsageError, match="not both"):
        flow_grpo_step(x, v, x, generator=torch.Generator())
    with pytest.raises(UsageError, match="has no noise"):
        unirl.Strategy("cps").denoise(v, x, torch.tensor(0.3), torch.tensor(0.0))


WAN = "flow_grpo.diffusers_patch.wan_pipeline_with_logprob"
SIGNATURES: dict[tuple[str, str], Callable] = {
    (WAN, "wan_pipeline_with_logprob"): flow_grpo.wan_pipeline_with_logprob,
    (WAN, "sde_step_with_logprob"): flow_grpo.sde_step_with_logprob,
    ("flow_factory.scheduler.unipc_multistep", "UniPCMultistepSDEScheduler.step"): flow_factory.step,
    ("unirl.sde.kernels", "StepStrategy.denoise"): unirl.Strategy.denoise,
    (
        "verl_omni.pipelines.model_base",
        "DiffusionModelBase.forward_and_sample_previous_step",
    ): verl_omni.forward_and_sample_previous_step,
}
READ = {
    "wan_pipeline_with_logprob": """self prompt negative_prompt height width num_frames num_inference_steps
        guidance_scale num_videos_per_prompt generator latents prompt_embeds negative_prompt_embeds output_type
        return_dict attention_kwargs callback_on_step_end callback_on_step_end_tensor_inputs max_sequence_length
        determistic kl_reward return_pixel_log_prob""",
    "sde_step_with_logprob": """self model_output timestep sample prev_sample generator determistic
        return_pixel_log_prob return_dt_and_std_dev_t""",
    "step": """noise_pred timestep latents next_latents timestep_next generator noise_level compute_log_prob
        return_dict return_kwargs dynamics_type sigma_max""",
    "denoise": "self noise_pred sample sigma sigma_next eta prev_sample generator sigma_max step_index",
    "forward_and_sample_previous_step": """module scheduler model_config model_inputs negative_model_inputs
        scheduler_inputs step""",
}


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_signatures_are_those_that_were_read_and_those_of_an_installed_package(module: str, name: str) -> None:
    """The names as read at the commits that docs/drop-in.md lists; where the package is there, its own."""
    ours = list(inspect.signature(SIGNATURES[module, name]).parameters)
    read = READ[name.rsplit(".", 1)[-1]].split()
    assert [p for p in ours if p in read or p == "self"] == read
    if importlib.util.find_spec(module.split(".")[0]):
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        theirs = [p for p in inspect.signature(found).parameters if p not in ("cls",)]  # type: ignore[arg-type]
        assert [p for p in theirs if p not in ours] == []
