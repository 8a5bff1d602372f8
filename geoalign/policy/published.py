"""Retakes as ReDirector's inference script makes them: the settings, the noise, the rounding of every step.

Read from its repository (commit 2ceace5); docs/benchmark.md lists what differs from the defaults of `geoalign sample`.
Latents, noise and guidance are rounded to bfloat16 after each operation, as there: near sigma 1 a step is about as
large as the spacing of bfloat16, so float32 latents would give other videos.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from geoalign.flow.sigmas import full_grid
from geoalign.flow.table import TIMESTEP_SCALE
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import refuse_non_finite
from geoalign.types import RetakeBatch

STEPS, SHIFT, GUIDANCE, SEED = 50, 5.0, 5.0, 0
"""Of the sampler; the seed is that of every video."""
CRF = 10
"""Constant quality of the mp4."""
FOLDER_FPS = 30.0
"""Frames per second of a folder of pictures."""
LATENTS = torch.bfloat16


def published_noise(shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Standard normal latents ``[1, *shape]`` bfloat16 on the CPU: torch's generator draws them in float32."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)).to(LATENTS)


@torch.no_grad()
def published_retake(
    policy: RetakePolicy,
    batch: RetakeBatch,
    *,
    on_pass: Callable[[int], object] = lambda passes: None,
    on_decode: Callable[[], object] = lambda: None,
) -> Tensor:
    """Sample and decode one condition: ``[1, F, 3, H, W]`` in [-1, 1]; ``policy.guidance`` is used as it is.

    ``on_pass`` is told after each step how many passes of the network it took, ``on_decode`` when decoding begins.

    Raises:
        UserError: the batch lacks what the model reads.
        RunError: the model or its codec gave NaN or infinity.
    """
    precomputed = policy.precompute(policy.condition(batch))
    x = published_noise(policy.latent_shape(batch)).to(policy.device)
    for sigma, following in pairwise(full_grid(STEPS, SHIFT).tolist()):
        timestep = torch.full((1,), TIMESTEP_SCALE * sigma, dtype=torch.float64, device=policy.device)
        answer = policy.velocity(x.float(), timestep, precomputed).map(lambda value: value.to(LATENTS))
        velocity = answer.value
        if answer.uncond is not None:
            velocity = answer.uncond + answer.guidance * (velocity - answer.uncond)
        x = x + velocity * (following - sigma)
        on_pass(answer.passes)
    refuse_non_finite(x, "the model")
    on_decode()
    video = policy.decode(x.float(), batch.source.video)
    refuse_non_finite(video, "the autoencoder")
    return video


def truncated(video: Tensor) -> Tensor:
    """Frames ``[F, 3, H, W]`` in [-1, 1] as uint8 ``[F, H, W, 3]``, cut off below the next level instead of rounded."""
    levels = video.float().add(1.0).mul_(127.5).clamp_(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()
