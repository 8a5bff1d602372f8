"""The retake transformer: Wan2.1's video DiT with an optional source video and camera control, all by configuration.

Parameter names are those of the original Wan2.1 files, so that published checkpoints load without renaming. The
parameters of self-attention are exactly those whose name contains ``self_attn``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from geoalign.config.model import ModelConfig
from geoalign.errors import UsageError
from geoalign.geometry.plane import pixel_grid
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models import camera as cameras
from geoalign.models.conditioning import ConditionCache, Conditioning, CrossKeys, Phases, joined, on_tensors, repeated
from geoalign.models.execution import Execution
from geoalign.models.layers import Block, Head, ImageProjector, PatchEmbedding, Stream, sinusoid, wide
from geoalign.models.rope import frame_indices, grid_angles

VelocityFn = Callable[[Tensor, Tensor, Conditioning], Tensor]

# What runs once per condition and is kept: parameters of these modules would miss gradients behind a kept cache.
_CACHED = ("text_embedding.", "img_emb.", "control_adapter.", "camera_embedding.", "patch_embedding.")
_CACHED_CROSS = ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img")
# What makes camera phases: kept for deterministic steps, made anew with their graph where gradients are enabled.
_PHASES = ("camera_gain", "rope_phase_")


@dataclass(slots=True)
class BlockResidual:
    """What all blocks together added to the target tokens of a forward, in the stream's dtype; empty before it.

    ``[B, N, dim]``, or ``[2 B, N, dim]`` under a negative prompt; of the local tokens where ranks share them.
    """

    value: Tensor | None = None

    def fill(self, out: Tensor, entered: Tensor) -> None:
        """Keep ``out - entered``; under a negative prompt the same tokens entered both halves."""
        self.value = out - _halves(entered, out.shape[0] // entered.shape[0])

    def added_to(self, entered: Tensor) -> Tensor:
        """What the blocks would have returned, had they added the same."""
        assert self.value is not None
        return _halves(entered, self.value.shape[0] // entered.shape[0]) + self.value


class RetakeDiT(nn.Module):
    """Predicts the flow velocity (noise minus data) of a target video, given a source video and cameras.

    Attributes:
        execution: how it runs (recomputation, pruning, attention core, compilation); change it at any time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.execution, dim = config, Execution(), config.dim
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, layer, self.execution) for layer in range(config.layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageProjector(config.image_dim, dim)
        if config.pluecker_adapter:
            self.control_adapter = cameras.PlueckerAdapter(config)
        if config.camera == "geometric":
            self.camera_embedding = cameras.GeometricEmbedding(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Conditioning,
        cache: ConditionCache | None = None,
        kept: BlockResidual | None = None,
    ) -> Tensor:
        """Velocity at noisy latents.

        Args:
            x: ``[B, C, T, h, w]`` float32 noisy target latents (frames 1.. only if ``first_frame_given``).
            timestep: ``[B]`` float32 in [0, 1000].
            cond: conditions of the B samples.
            cache: result of :meth:`precompute` for ``cond``; computed here when None. Camera phases of trained
                parameters are not taken from it where gradients are enabled: they are computed again, with their graph.
            kept: an empty one is filled with what the blocks add to the target tokens; a filled one takes their place.

        Returns:
            ``[B, out_channels, T, h, w]`` float32. With a negative prompt in the cache ``[2 B, ...]``: first the
            velocities under the prompts, then those under the negative prompts; all that comes before the first
            cross-attention runs once for both.
        """
        if cache is None:
            cache = self.precompute(cond, x.shape[2:])
        elif torch.is_grad_enabled():
            cache = self._with_live_phases(cache, cond)
        tokens = self.patch_embedding(x)
        count = tokens.shape[1]
        if cache.source_tokens is not None:
            tokens = torch.cat([tokens, cache.source_tokens], 1)
        if cache.token_offset is not None:
            tokens = tokens + cache.token_offset
        position, sequence = self._position(x.shape, tokens.shape[1]), self.execution.sequence
        if sequence is not None:
            local = sequence.layout(count, tokens.shape[1])
            tokens, cache, count = local.tokens(tokens), local.cache(cache), local.count
            position = None if position is None else local.rows(position)
        embedded, time = self._time(timestep)
        h = wide(tokens)
        if kept is None or kept.value is None:
            out = self._blocks(h, time, position, cache, count)[:, :count]
        else:
            out = kept.added_to(h[:, :count])
        if kept is not None and kept.value is None:
            kept.fill(out, h[:, :count])
        if cache.negative:
            embedded, x, timestep = (torch.cat([part, part]) for part in (embedded, x, timestep))
        tokens = self.head(out, embedded)
        flow = self._unpatch(tokens if sequence is None else sequence.gather(tokens), x.shape)
        return flow if self.config.data_variance is None else self._precondition(x, timestep, flow)

    def _blocks(self, h: Tensor, time: Tensor, position: Tensor | None, cache: ConditionCache, count: int) -> Tensor:
        """All blocks; ``h`` ``[B, N, dim]``, the first ``count`` tokens are the target's."""
        stream = Stream(h)
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            keep = count if last and self.execution.prune_source else h.shape[1]
            keys = cache.cross[layer]
            if cache.negative:
                keys = joined([keys, cache.negative[layer]])
            stream = block(stream, time, position, _camera(cache, layer), keys, cache.poses, keep)
            if cache.negative and layer == 0:  # from here on both halves are computed
                time, cache = torch.cat([time, time]), _doubled(cache)
        return stream.settled()

    def precompute(self, cond: Conditioning, size: torch.Size | None = None) -> ConditionCache:
        """Compute what depends neither on noisy latents nor on time, once per condition.

        ``size`` (T, h, w) of the target latents is needed only by a model that has the Pluecker adapter and no source
        video.
        """
        config = self.config
        cache = ConditionCache(
            cross=self._cross_keys(self._context(cond), cond.image_tokens),
            negative=() if cond.negative is None else self._cross_keys(cond.negative, cond.image_tokens),
        )
        if config.source == "none":
            if not config.pluecker_adapter:
                return cache
            if size is None:
                raise UsageError("precompute() needs the size of the target latents when there is no source video")
            return replace(cache, token_offset=self._adapter_tokens(cond.target_camera, size))
        if cond.source_latents is None:
            raise UsageError("this model needs source_latents")
        tokens = self.patch_embedding(cond.source_latents)
        return self._precompute_camera(replace(cache, source_tokens=tokens), cond, cond.source_latents.shape[2:])

    def is_cached(self, name: str) -> bool:
        """Whether the output of parameter ``name`` is kept with the condition, so that it must stay frozen in RL."""
        part = name.split(".")
        if name.startswith(_CACHED):
            return True
        if "cross_attn" not in part and "norm3" not in part:
            return False
        # Over one text token the whole cross-attention is one kept constant, and its norm is skipped.
        alone = self.config.text_length == 1 and self.config.image_dim is None
        return alone or part[-2] in _CACHED_CROSS

    @property
    def trains_text(self) -> bool:
        """Whether a trained parameter needs a text of several tokens: over one the cross-attention is a constant."""
        reading = (p for name, p in self.named_parameters() if "cross_attn." in name or "norm3." in name)
        return self.config.text_length > 1 and any(p.requires_grad for p in reading)

    def _cross_keys(self, context: Tensor, image_tokens: Tensor | None) -> tuple[CrossKeys, ...]:
        text, image = self.text_embedding(context.to(self.text_embedding[0].weight.dtype)), None
        if self.config.image_dim is not None:
            if image_tokens is None:
                raise UsageError("this model has an image branch and needs image_tokens")
            image = self.img_emb(image_tokens)
        return tuple(block.cross_keys(text, image) for block in self.blocks)

    def _precompute_camera(self, cache: ConditionCache, cond: Conditioning, size: torch.Size) -> ConditionCache:
        config = self.config
        frames, rows, columns = (n // p for n, p in zip(size, config.patch, strict=True))
        target_frames = frames - int(config.first_frame_given)
        if config.pluecker_adapter:
            target = self._adapter_tokens(cond.target_camera, torch.Size((target_frames, *size[1:])))
            offset = torch.cat([target, self._adapter_tokens(cond.source_camera, size)], 1)
            cache = replace(cache, token_offset=offset, camera_tokens=offset if config.camera == "learned" else None)
            if config.camera == "learned" and self.execution.cache_phases and not torch.is_grad_enabled():
                cache = replace(cache, phases=tuple(b.learned_phases(offset) for b in self.blocks))
            return cache
        if config.camera == "geometric":
            phases = self._geometric_phases(cond)
            assert cond.ground_plane is not None  # geometric phases have refused None
            pixels = pixel_grid(rows, columns).to(cond.ground_plane)
            offset = self.camera_embedding(pixels, cond.ground_plane[:, 3], target_frames, frames)
            return replace(cache, token_offset=offset, phases=phases)
        if config.camera == "modulated":
            if cond.target_camera is None:
                raise UsageError("this model needs target_camera")
            poses = cameras.latent_frame_poses(cond.target_camera, config.time_stride)[..., :3, :].flatten(2)
            return replace(cache, poses=poses.repeat_interleave(rows * columns, 1).repeat(1, 2, 1))
        return cache

    def _geometric_phases(self, cond: Conditioning) -> tuple[Phases, ...]:
        assert cond.source_latents is not None
        gains = torch.stack([block.self_attn.camera_gain for block in self.blocks])
        grid = [n // p for n, p in zip(cond.source_latents.shape[2:], self.config.patch, strict=True)]
        target_frames = grid[0] - int(self.config.first_frame_given)
        return cameras.geometric_phases(self.config, gains, cond, target_frames, (grid[0], grid[1], grid[2]))

    def _with_live_phases(self, cache: ConditionCache, cond: Conditioning) -> ConditionCache:
        """The cache with camera phases that carry the graph of their trained parameters."""
        trained = (p for name, p in self.named_parameters() if any(part in name for part in _PHASES))
        if not any(parameter.requires_grad for parameter in trained):
            return cache
        if self.config.camera == "geometric":
            return replace(cache, phases=self._geometric_phases(cond))
        if self.config.camera == "learned":
            return replace(cache, phases=())  # every layer makes its own of the camera tokens
        return cache

    def _adapter_tokens(self, camera: CameraTrajectory | None, size: torch.Size) -> Tensor:
        """Adapter tokens ``[B, T * rows * columns, dim]`` of one stream of latents of ``size`` (T, h, w)."""
        if camera is None:
            raise UsageError("a model with the Pluecker adapter needs the cameras of all its streams")
        height, width = (n * self.config.space_stride for n in size[1:])
        maps = cameras.adapter_input(camera, height, width, self.config.time_stride)
        return self.control_adapter(maps[:, :, -size[0] :])

    def _position(self, size: torch.Size, tokens: int) -> Tensor | None:
        """Rotary angles ``[N, head_dim / 2]`` of all tokens; None where the camera phases hold them."""
        config = self.config
        if config.camera == "geometric":
            return None
        frames, rows, columns = (n // p for n, p in zip(size[2:], config.patch, strict=True))
        index = frame_indices(config, frames, tokens // (rows * columns) - frames)
        return grid_angles(config, index, rows, columns, self.patch_embedding.weight.device)

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding ``[B, dim]`` and block modulation ``[B, 6, dim]``, float32."""
        if self.config.timestep_dtype == "bfloat16":
            timestep = timestep.bfloat16()
        features = sinusoid(timestep, self.config.freq_dim).to(self.time_embedding[0].weight.dtype)
        embedded = self.time_embedding(features)
        return wide(embedded), wide(self.time_projection(embedded)).unflatten(1, (6, -1))

    def _context(self, cond: Conditioning) -> Tensor:
        """Text encoder output in the parameters' dtype; one zero token when there is no text."""
        weight = self.text_embedding[0].weight
        if cond.context is None:
            batch = 1 if cond.source_latents is None else len(cond.source_latents)
            return torch.zeros(batch, 1, self.config.text_dim, device=weight.device, dtype=weight.dtype)
        return cond.context.to(weight.dtype)

    def _unpatch(self, tokens: Tensor, size: torch.Size) -> Tensor:
        """``[B, N, patch volume * channels]`` (channel fastest) to ``[B, channels, T, h, w]``."""
        t, r, c = self.config.patch
        grid = size[2] // t, size[3] // r, size[4] // c
        x = tokens.unflatten(2, (t, r, c, -1)).unflatten(1, grid)  # [B, T, R, W, t, r, c, C]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)

    def _precondition(self, x: Tensor, timestep: Tensor, flow: Tensor) -> Tensor:
        """Velocity from the network output F, for data of variance s2 at noise level sigma = timestep / 1000.

        ``v = ((sigma - (1 - sigma) s2) x - sqrt(s2 den) F) / den`` with ``den = sigma^2 + (1 - sigma)^2 s2``: F is then
        of unit variance at every sigma, and F = 0 is the best linear guess (the conditional mean of Gaussian data).
        """
        variance = self.config.data_variance
        assert variance is not None
        sigma = (wide(timestep) / 1000).view(-1, 1, 1, 1, 1)
        den = sigma.square() + (1 - sigma).square() * variance
        return ((sigma - (1 - sigma) * variance) * x - (variance * den).sqrt() * flow) / den


def _halves(tokens: Tensor, count: int) -> Tensor:
    """All rows, then all rows again, as the two prompts of guidance lie."""
    return tokens if count == 1 else tokens.repeat(count, 1, 1)


def _camera(cache: ConditionCache, layer: int) -> Phases | Tensor | None:
    """Phases of a layer, or the tokens that it makes them of."""
    return cache.phases[layer] if cache.phases else cache.camera_tokens


def _doubled(cache: ConditionCache) -> ConditionCache:
    """What blocks read beside the keys, for 2 B rows: the B samples twice."""
    phases, tokens, poses = on_tensors(
        (cache.phases, cache.camera_tokens, cache.poses),
        lambda t: repeated(t, 2) if t.shape[0] == 1 else torch.cat([t, t]),
    )
    return replace(cache, phases=phases, camera_tokens=tokens, poses=poses)


@torch.no_grad()
def init_tiny_(model: RetakeDiT) -> RetakeDiT:
    """Initialise a small model that learns in minutes; draws from torch's global generator.

    Queries and keys start nearly constant, so that attention is decided by the rotary angles alone (a gather by
    distance between ground points); residual gates start half open; time modulation and output start near zero.
    """
    for block in model.blocks:
        for projection in (block.self_attn.q, block.self_attn.k):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.ones_(projection.bias)
        nn.init.zeros_(block.self_attn.v.bias)
        # The camera phases before and after the output projection cancel only if it commutes with them, as this does.
        nn.init.eye_(block.self_attn.o.weight)
        nn.init.zeros_(block.self_attn.o.bias)
        block.modulation.zero_()
        block.modulation[:, [2, 5]] = 0.5
    nn.init.zeros_(model.time_projection[1].weight)
    nn.init.zeros_(model.time_projection[1].bias)
    model.head.modulation.zero_()
    nn.init.normal_(model.head.head.weight, std=0.02)
    nn.init.zeros_(model.head.head.bias)
    if model.config.camera == "geometric":
        nn.init.normal_(model.camera_embedding.stream, std=0.02)
    return model
