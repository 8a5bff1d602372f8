"""flow_grpo's Wan loop with this project's rollout, step and fused blocks: one update on a tiny random model.

For a real run replace ``pipeline()`` by ``WanPipeline.from_pretrained(...)`` and keep flow_grpo's trainer: only its two
imports change.
"""

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from geoalign.integrations.flow_grpo import sde_step_with_logprob, wan_pipeline_with_logprob
from geoalign_kernels import accelerate

PROMPTS, GROUP, STEPS, GUIDANCE = 2, 4, 10, 4.5
torch.manual_seed(0)


def pipeline() -> WanPipeline:
    """Random weights; the scheduler is that of the published pipeline."""
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, cross_attn_norm=True,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, network)  # type: ignore[arg-type]
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    return pipe


pipe = pipeline()
handle = accelerate(pipe.transformer)  # level "rounding"; handle.remove() takes it off again
prompts, nothing = torch.randn(PROMPTS, 16, 32), torch.randn(1, 16, 32)
with torch.no_grad():
    videos, states, old, _ = wan_pipeline_with_logprob(
        pipe, prompt_embeds=prompts, negative_prompt_embeds=nothing, num_videos_per_prompt=GROUP, height=48, width=64,
        num_frames=9, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", return_dict=False,
        stochastic=range(4, 6), seed=0, rows_per_forward=1,
    )  # fmt: skip
reward = -videos.square().flatten(1).mean(1).view(PROMPTS, GROUP)
advantage = ((reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)).flatten()
optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=1e-4)


def replay(step: int, row: int) -> torch.Tensor:
    """flow_grpo's compute_log_prob, one sample at a time: the batch shape of the rollout."""
    at, t = slice(row, row + 1), pipe.scheduler.timesteps[4 + step]
    given = {"hidden_states": states[step][at], "timestep": t.expand(1), "return_dict": False}
    prompt = prompts[row // GROUP : row // GROUP + 1]
    text, free = (pipe.transformer(**given, encoder_hidden_states=embeds)[0] for embeds in (prompt, nothing))
    velocity = free + GUIDANCE * (text - free)
    return sde_step_with_logprob(pipe.scheduler, velocity, t[None], states[step][at], prev_sample=states[step + 1][at])[
        1
    ]


for moment in ("before the update", "after the update"):
    ratios = []
    for step, row in ((s, r) for s in range(2) for r in range(PROMPTS * GROUP)):
        ratio = (replay(step, row) - old[step][row]).exp()
        ratios.append(ratio.item())
        (-ratio.mean() * advantage[row] / (2 * PROMPTS * GROUP)).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"ratio {moment}: {min(ratios)} to {max(ratios)}")
