"""The retake transformer: Wan2.1's video DiT with an optional source video and camera control, all by configuration.

Parameter names are those of the original Wan2.1 files, so that published checkpoints load without renaming. The
parameters of self-attention are exactly those whose name contains ``self_attn``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geoalign.config.model import ModelConfig
from geoalign.errors import UsageError
from geoalign.geometry.plane import pixel_grid
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models import camera as cameras
from geoalign.models.conditioning import ConditionCache, Conditioning, LayerAngles, LayerRotation
from geoalign.models.layers import Block, Head, ImageProjector, PatchEmbedding, sinusoid
from geoalign.models.rope import frame_indices, fused, grid_angles, grid_rotation

VelocityFn = Callable[[Tensor, Tensor, Conditioning], Tensor]


class RetakeDiT(nn.Module):
    """Predicts the flow velocity (noise minus data) of a target video, given a source video and cameras.

    Attributes:
        prune_source: skip the last block's queries and feed-forward of source tokens, whose output is unused (exact).
        recompute: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.prune_source, self.recompute = True, False
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageProjector(config.image_dim, dim)
        if config.pluecker_adapter:
            self.control_adapter = cameras.PlueckerAdapter(config)
        if config.camera == "geometric":
            self.camera_embedding = cameras.GeometricEmbedding(config)

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning, cache: ConditionCache | None = None) -> Tensor:
        """Velocity at noisy latents.

        Args:
            x: ``[B, C, T, h, w]`` float32 noisy target latents (frames 1.. only if ``first_frame_given``).
            timestep: ``[B]`` float32 in [0, 1000].
            cond: conditions of the B samples.
            cache: result of :meth:`prepare` for ``cond``; computed here when None.

        Returns:
            ``[B, out_channels, T, h, w]`` float32.
        """
        cache = self.prepare(cond, x.shape[2:]) if cache is None else cache
        tokens = self.patch_embedding(x)
        count = tokens.shape[1]
        if cache.source_tokens is not None:
            tokens = torch.cat([tokens, cache.source_tokens], 1)
        if cache.token_offset is not None:
            tokens = tokens + cache.token_offset
        embedded, modulation = self._time(timestep)
        h = tokens.float()
        for layer in range(len(self.blocks)):
            last = self.prune_source and layer == len(self.blocks) - 1
            keep = count if last else h.shape[1]
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(self._block, layer, h, modulation, x.shape, cache, keep, use_reentrant=False)
            else:
                h = self._block(layer, h, modulation, x.shape, cache, keep)
        flow = self._unpatch(self.head(h[:, :count], embedded), x.shape)
        return flow if self.config.data_variance is None else self._precondition(x, timestep, flow)

    def prepare(self, cond: Conditioning, size: torch.Size | None = None) -> ConditionCache:
        """Compute what depends neither on noisy latents nor on time, once per condition.

        Gradients flow into self-attention's camera gains if they are enabled, so a learner calls this at every update
        while rollouts keep one result. ``size`` (T, h, w) of the target latents is needed only by a model that has the
        Pluecker adapter and no source video.
        """
        config = self.config
        text = self.text_embedding(self._context(cond))
        image = None
        if config.image_dim is not None:
            if cond.image_tokens is None:
                raise UsageError("this model has an image branch and needs image_tokens")
            image = self.img_emb(cond.image_tokens)
        cache = ConditionCache(cross=tuple(block.cross_attn.prepare(text, image) for block in self.blocks))
        if config.source == "none":
            if not config.pluecker_adapter:
                return cache
            if size is None:
                raise UsageError("prepare() needs the size of the target latents when there is no source video")
            return replace(cache, token_offset=self._adapter_tokens(cond.target_camera, size))
        if cond.source_latents is None:
            raise UsageError("this model needs source_latents")
        tokens = self.patch_embedding(cond.source_latents)
        return self._prepare_camera(replace(cache, source_tokens=tokens), cond, cond.source_latents.shape[2:])

    def _prepare_camera(self, cache: ConditionCache, cond: Conditioning, size: torch.Size) -> ConditionCache:
        config = self.config
        frames, rows, columns = (n // p for n, p in zip(size, config.patch, strict=True))
        target_frames = frames - int(config.first_frame_given)
        if config.pluecker_adapter:
            target = self._adapter_tokens(cond.target_camera, torch.Size((target_frames, *size[1:])))
            offset = torch.cat([target, self._adapter_tokens(cond.source_camera, size)], 1)
            return replace(cache, token_offset=offset, camera_tokens=offset if config.camera == "learned" else None)
        if config.camera == "geometric":
            gains = torch.stack([block.self_attn.camera_gain for block in self.blocks])
            rotations = cameras.geometric_rotations(config, gains, cond, target_frames, (frames, rows, columns))
            assert cond.ground_plane is not None  # geometric_rotations has refused None
            pixels = pixel_grid(rows, columns).to(cond.ground_plane)
            offset = self.camera_embedding(pixels, cond.ground_plane[:, 3], target_frames, frames)
            return replace(cache, token_offset=offset, rotations=rotations)
        if config.camera == "modulated":
            if cond.target_camera is None:
                raise UsageError("this model needs target_camera")
            poses = cameras.latent_frame_poses(cond.target_camera, config.time_stride)[..., :3, :].flatten(2)
            return replace(cache, poses=poses.repeat_interleave(rows * columns, 1).repeat(1, 2, 1))
        return cache

    def _adapter_tokens(self, camera: CameraTrajectory | None, size: torch.Size) -> Tensor:
        """Adapter tokens ``[B, T * rows * columns, dim]`` of one stream of latents of ``size`` (T, h, w)."""
        if camera is None:
            raise UsageError("a model with the Pluecker adapter needs the cameras of all its streams")
        height, width = (n * self.config.space_stride for n in size[1:])
        maps = cameras.adapter_input(camera, height, width, self.config.time_stride)
        return self.control_adapter(maps[:, :, -size[0] :])

    def _block(
        self, layer: int, h: Tensor, modulation: Tensor, size: torch.Size, cache: ConditionCache, keep: int
    ) -> Tensor:
        return self.blocks[layer](
            h, modulation, self._rotation(layer, size, cache), cache.cross[layer], cache.poses, keep
        )

    def _rotation(self, layer: int, size: torch.Size, cache: ConditionCache) -> LayerRotation | LayerAngles:
        """Rotations of one layer for target latents of ``size``; learned phases are computed where they are used."""
        if cache.rotations:
            return cache.rotations[layer]
        config = self.config
        frames, rows, columns = (n // p for n, p in zip(size[2:], config.patch, strict=True))
        source_tokens = 0 if cache.source_tokens is None else cache.source_tokens.shape[1]
        index = frame_indices(config, frames, source_tokens // (rows * columns))
        grid = config, index, rows, columns, self.patch_embedding.weight.device
        attention, phases = self.blocks[layer].self_attn, ()
        if cache.camera_tokens is not None:
            phases = attention.rope_phase_qk(cache.camera_tokens), attention.rope_phase_vo(cache.camera_tokens)
        if fused(self.patch_embedding.weight.device):
            position = grid_angles(*grid)[0, :, 0]
            return cameras.learned_angles(config, position, *phases) if phases else LayerAngles(position)
        base = grid_rotation(*grid)
        return cameras.learned_rotation(config, base, *phases) if phases else LayerRotation(base)

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding ``[B, dim]`` and block modulation ``[B, 6, dim]``, float32."""
        if self.config.timestep_dtype == "bfloat16":
            timestep = timestep.bfloat16()
        features = sinusoid(timestep, self.config.freq_dim).to(self.time_embedding[0].weight.dtype)
        embedded = self.time_embedding(features)
        return embedded.float(), self.time_projection(embedded).float().unflatten(1, (6, -1))

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
        sigma = (timestep.float() / 1000).view(-1, 1, 1, 1, 1)
        den = sigma.square() + (1 - sigma).square() * variance
        return ((sigma - (1 - sigma) * variance) * x - (variance * den).sqrt() * flow) / den


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
