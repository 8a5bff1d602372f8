"""The policy as the sampler sees it: a model and a codec, conditions in, velocities and videos out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.models.codec_base import LatentCodec
from geoalign.models.conditioning import ConditionCache, Conditioning
from geoalign.models.dit import RetakeDiT
from geoalign.types import Encodings, RetakeBatch


@dataclass(frozen=True, slots=True)
class Prepared:
    """Conditions together with everything in the network that depends neither on the latents nor on the step."""

    conditioning: Conditioning
    cache: ConditionCache

    def repeat_interleave(self, count: int) -> Prepared:
        """The same for groups of ``count`` members lying next to each other."""
        return Prepared(self.conditioning.repeat_interleave(count), self.cache.repeat_interleave(count))

    def select(self, index: Tensor) -> Prepared:
        """The conditions at ``index`` ``[N]`` int64."""
        return Prepared(self.conditioning.select(index), self.cache.select(index))


@dataclass(frozen=True, slots=True)
class RetakePolicy:
    """A retake model with its codec.

    Attributes:
        model: the DiT; its output is the velocity.
        codec: pixels to latents.
    """

    model: RetakeDiT
    codec: LatentCodec

    @torch.no_grad()
    def condition(self, batch: RetakeBatch) -> Conditioning:
        """Encode B conditions, taking prepared encodings where the batch has them.

        Without a prepared text embedding the text is one zero token.

        Raises:
            DataError: prepared embeddings of another size than the model reads.
        """
        config, ready = self.model.config, batch.encodings or Encodings()
        latents = self.codec.encode(batch.source.video) if ready.latents is None else ready.latents.float()
        if ready.context is None:
            context = torch.zeros(len(batch), 1, config.text_dim, device=batch.source.video.device)
        else:
            context = self._padded(ready.context.float())
        return Conditioning(
            source_latents=latents,
            source_camera=batch.source.camera,
            target_camera=batch.target_camera,
            ground_plane=batch.source.ground_plane,
            context=context,
            image_tokens=None if ready.image_tokens is None else ready.image_tokens.float(),
        )

    def _padded(self, context: Tensor) -> Tensor:
        """``[B, L, D]`` with zero tokens up to the model's text length: they take part in attention."""
        length, dim = self.model.config.text_length, self.model.config.text_dim
        if context.shape[-1] != dim or context.shape[1] > length:
            raise DataError(
                f"prepared text embeddings are {context.shape[1]} tokens of width {context.shape[-1]}, the model reads "
                f"{length} of width {dim}; set data.prepare.text and text_length to fit and run `geoalign prepare`"
            )
        return torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1]))

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """Compute the step-independent part once (with gradient when gradients are on: the camera gains live there)."""
        return Prepared(conditioning, self.model.prepare(conditioning))

    def velocity(self, x: Tensor, timestep: Tensor, prepared: Prepared) -> Tensor:
        """Velocity like ``x`` ``[B, C, T, h, w]`` at ``timestep`` ``[B]`` in [0, 1000]."""
        return self.model(x, timestep, prepared.conditioning, prepared.cache)

    def latent_shape(self, batch: RetakeBatch) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the noisy latents of one retake; a given first frame is not among them."""
        _, frames, _, height, width = batch.source.video.shape
        channels, latent_frames, rows, columns = self.codec.latent_shape(frames, height, width)
        return channels, latent_frames - self.model.config.first_frame_given, rows, columns

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: RetakeBatch) -> Tensor:
        """Videos ``[B, F, 3, H, W]`` in [-1, 1] of latents; a given first frame is put in front."""
        video = self.codec.decode(latents).clamp(-1, 1)
        if self.model.config.first_frame_given:
            video = torch.cat([batch.source.video[:, :1], video], dim=1)
        return video
