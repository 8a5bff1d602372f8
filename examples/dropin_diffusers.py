"""GRPO of a diffusers Wan pipeline in one's own loop: groups with a shared prefix, exact replay, fused blocks.

For a real run replace ``pipeline()`` by ``WanPipeline.from_pretrained(...)``, with LoRA, DDP, checkpointing as usual,
and the tensors by ``pipe.encode_prompt(...)``.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from geoalign.integrations import GroupRollout
from geoalign_kernels import accelerate

GROUP, STEPS, WINDOW, CLIP = 4, 10, (2, 5), 1e-4
torch.manual_seed(0)


def pipeline() -> WanPipeline:
    """Random weights."""
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, cross_attn_norm=True,
    )  # fmt: skip
    return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0), network)  # type: ignore[arg-type]


pipe = pipeline()
handle = accelerate(pipe.transformer)
for row in handle.report():
    print(f"{row['part']}: {row['runs']}")
group = GroupRollout.from_pipeline(pipe, STEPS, GROUP, stochastic=WINDOW, guidance=4.0, rows_per_forward=2)
texts, negative = {"prompt_embeds": torch.randn(2, 16, 32)}, {"prompt_embeds": torch.randn(1, 16, 32)}
optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=1e-4)

samples = group.sample(texts, negative=negative, shape=(4, 3, 6, 8), seed=0, iteration=0)
count, plain = samples.rollout.forwards.total, 2 * 2 * GROUP * STEPS
print(f"{count} network evaluations, {plain} without sharing")
reward = -samples.latents.square().flatten(1).mean(1).view(-1, GROUP)
advantage = ((reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)).flatten()

assert group.log_prob_diff(samples) == 0.0  # rollout and learner run the same artefact
for moment in ("before the update", "after the update"):
    ratios = []
    for position in range(len(WINDOW)):
        for rows in group.replay_batches(samples, position):
            ratio = (group.replay(samples, position, rows).log_prob - samples.log_prob[rows, position]).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * advantage[rows], clipped * advantage[rows]).sum()
            (loss / samples.log_prob.numel()).backward()
            ratios += ratio.tolist()
    optimizer.step()
    optimizer.zero_grad()
    print(f"ratio {moment}: {min(ratios)} to {max(ratios)}")
