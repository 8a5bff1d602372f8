"""Supervised flow matching of the embedded base policy on paired renders.

The labels of the target motion are wrong on purpose (:class:`LabelBias`): the base then errs differently along each
axis and more and more over a clip, as the metric scale of published models drifts, and reinforcement learning has
something real to repair.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.models.codec import PatchCodec
from geoalign.models.conditioning import Conditioning
from geoalign.policy.files import new_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.world.pairs import LabelBias, paired_videos

_CHUNK = 256  # pairs rendered at a time


@dataclass(frozen=True, slots=True)
class Pool:
    """Rendered pairs as latents: conditions and clean target latents ``[N, C, T, h, w]``."""

    conditioning: Conditioning
    target: Tensor


def label_bias(config: Config) -> LabelBias:
    """The label bias of the pre-training settings."""
    settings = config.pretrain
    return LabelBias(settings.bias_mean, settings.bias_std, *settings.bias_growth)


def render_pool(config: Config, policy: RetakePolicy, progress: Callable[[int], object]) -> Pool:
    """Render ``pretrain.pool`` pairs and encode them; the patch codec's channel scale is fitted on the first chunk."""
    assert config.world is not None
    generator = torch.Generator().manual_seed(config.run.seed + 1)
    parts: list[tuple[Conditioning, Tensor]] = []
    for start in range(0, config.pretrain.pool, _CHUNK):
        count = min(_CHUNK, config.pretrain.pool - start)
        pairs = paired_videos(config.world, count, generator, bias=label_bias(config))
        if start == 0 and isinstance(policy.codec, PatchCodec):
            policy.codec.fit(pairs.batch.source.video)
        skip = int(policy.model.config.first_frame_given)
        parts.append((policy.condition(pairs.batch), policy.codec.encode(pairs.truth[:, skip:])))
        progress(count)
    return Pool(concatenate([cond for cond, _ in parts]), torch.cat([target for _, target in parts]))


def concatenate(conditions: list[Conditioning]) -> Conditioning:
    """Join conditions along the batch axis."""
    first = conditions[0]
    joined: dict[str, Any] = {}
    for name in first.__slots__:
        values = [getattr(cond, name) for cond in conditions]
        if values[0] is None or isinstance(values[0], Tensor):
            joined[name] = None if values[0] is None else torch.cat(values)
        else:
            joined[name] = type(values[0]).cat(values)
    return Conditioning(**joined)


def pretrain(config: Config, on_step: Callable[[int, float], None], on_render: Callable[[int], object]) -> RetakePolicy:
    """Train a base policy from scratch and return its weight average.

    Deterministic in ``run.seed`` on one machine. ``on_step(step, loss)`` and ``on_render(pairs)`` report progress.

    Raises:
        ConfigError: the configuration has no embedded world.
    """
    if config.world is None:
        raise ConfigError("pretrain needs the embedded world: use --config tiny_cpu, or set the world section")
    settings = config.pretrain
    policy = new_policy(config.model, config.codec, config.run.seed)
    pool = render_pool(config, policy, on_render)
    average = copy.deepcopy(policy.model)
    optimizer = _optimizer(policy, config)
    generator = torch.Generator().manual_seed(config.run.seed + 2)
    order = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(settings.pool, generator=generator)])
        index, order = order[: settings.batch], order[settings.batch :]
        loss = _loss(policy, pool, index, config.flow.shift, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        _blend(average, policy.model, min(settings.ema, 1 - 1 / (step / 5 + 1)))
        on_step(step, float(loss.detach()))
    return RetakePolicy(average.requires_grad_(False), policy.codec)


def _optimizer(policy: RetakePolicy, config: Config) -> torch.optim.AdamW:
    gains = [p for name, p in policy.model.named_parameters() if name.endswith("camera_gain")]
    rest = [p for name, p in policy.model.named_parameters() if not name.endswith("camera_gain")]
    groups = [{"params": rest, "peak_lr": config.pretrain.lr, "weight_decay": 0.01}]
    if gains:
        groups.append({"params": gains, "peak_lr": config.pretrain.gain_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.pretrain.lr, betas=(0.9, 0.98))


def _loss(policy: RetakePolicy, pool: Pool, index: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Flow-matching loss with stratified, shifted noise levels."""
    batch = len(index)
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    clean = pool.target[index]
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma[:, None, None, None, None]
    velocity = policy.model((1 - level) * clean + level * noise, 1000 * sigma, pool.conditioning.select(index))
    return (velocity - (noise - clean)).square().mean()


@torch.no_grad()
def _blend(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1 - decay)
