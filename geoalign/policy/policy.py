"""The policy as the sampler sees it: a model and a codec, conditions in, velocities and videos out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.config.training import TailReuse
from geoalign.errors import ConfigError, DataError, UsageError, argument
from geoalign.flow.policy import PhasedPolicy, Velocity
from geoalign.flow.reuse import Reuse
from geoalign.models.codec_base import LatentCodec
from geoalign.models.conditioning import ConditionCache, Conditioning, joined
from geoalign.models.dit import BlockResidual, RetakeDiT
from geoalign.types import Encodings, RetakeBatch


@dataclass(frozen=True, slots=True)
class Precomputed:
    """Conditions together with everything in the network that depends neither on the latents nor on the step."""

    conditioning: Conditioning
    cache: ConditionCache

    def repeat_interleave(self, count: int) -> Precomputed:
        """The same for groups of ``count`` members lying next to each other."""
        return Precomputed(self.conditioning.repeat_interleave(count), self.cache.repeat_interleave(count))

    def select(self, index: Tensor | slice) -> Precomputed:
        """The conditions at ``index`` (int64 ``[N]``, or a slice)."""
        return Precomputed(self.conditioning.select(index), self.cache.select(index))


@dataclass(frozen=True, slots=True)
class RetakePolicy:
    """A retake model with its codec.

    Attributes:
        model: the DiT; its output is the velocity. Stochastic steps and the learner run it.
        codec: pixels to latents.
        guidance: scale of classifier-free guidance in rollout and learner alike; 1 skips the negative prompt.
        fast: an approximate twin of ``model`` with the same trained parameters, for steps after the window, or None.
        reuse: what an evaluated step after the window leaves for later ones.
    """

    model: RetakeDiT
    codec: LatentCodec
    guidance: float = 1.0
    fast: RetakeDiT | None = None
    reuse: TailReuse = "off"

    @property
    def device(self) -> torch.device:
        """Where the model is; conditions are moved there."""
        return self.model.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's matrices."""
        return self.model.patch_embedding.weight.dtype

    @torch.no_grad()
    def condition(self, batch: RetakeBatch) -> Conditioning:
        """Encode B conditions, taking prepared encodings where the batch has them.

        A model that reads no text (``text_length`` 1) gets one zero token.

        Raises:
            UsageError: the model needs a ground plane, a text embedding or image tokens that are not given.
            DataError: prepared embeddings of another size than the model reads.
            ConfigError: guidance without a prepared embedding of the negative prompt.
        """
        batch = batch.to(self.device)
        config, ready = self.model.config, batch.encodings or Encodings()
        if config.camera == "geometric" and batch.source.ground_plane is None:
            given = argument("ground_plane", "nx,ny,nz,d", "ground_plane=(nx, ny, nz, d)")
            raise UsageError(
                "this model needs the ground plane of the scene, n . X = d in metres: ground_plane in the camera file "
                f"of every clip, or, of a single one, {given}"
            )
        if config.image_dim is not None and ready.image_tokens is None:
            raise UsageError(
                "this model needs an image encoder: set data.prepare.image and run `geoalign prepare`; "
                "`geoalign sample` looks for image_encoder/ or the open-clip .pth beside the weights"
            )
        latents = self.codec.encode(batch.source.video) if ready.latents is None else ready.latents.float()
        if ready.context is None:
            if self.model.trains_text:
                raise ConfigError(
                    "optim.trainable trains the cross-attention, but the data has no prepared text: set "
                    "data.prepare.text and run `geoalign prepare`, or train self-attention only"
                )
            if config.text_length > 1:  # it never saw a condition without any text, which even an empty prompt is
                raise UsageError(
                    "this model reads text, and there is none: set data.prepare.text and data.use_cache, and run "
                    "`geoalign prepare`; `geoalign sample` looks for a text encoder beside the weights"
                )
            context = torch.zeros(len(batch), 1, config.text_dim, device=self.device)
        else:
            context = self._padded(ready.context.float())
        negative = None
        if self.guidance != 1.0:
            if ready.negative is None:
                raise ConfigError(
                    "flow.guidance needs the embedding of a negative prompt: set data.prepare.text and run "
                    "`geoalign prepare`, or set flow.guidance to 1"
                )
            negative = self._padded(ready.negative.float())
        return Conditioning(
            source_latents=latents,
            source_camera=batch.source.camera,
            target_camera=batch.target_camera,
            ground_plane=batch.source.ground_plane,
            context=context,
            image_tokens=None if ready.image_tokens is None else ready.image_tokens.float(),
            negative=negative,
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

    @torch.no_grad()
    def precompute(self, conditioning: Conditioning) -> Precomputed:
        """Compute the step-independent part once, of the present parameters.

        Trained parameters in it (camera phases) are computed again by every forward that needs their gradient.
        """
        return Precomputed(conditioning, self.model.precompute(conditioning))

    def prepare(self, batch: RetakeBatch) -> Precomputed:
        """:meth:`condition` and :meth:`precompute` of B conditions, one after another.

        The numbers of a condition then do not depend on the others, which another number of ranks would change.
        """
        return joined([self.precompute(self.condition(batch.select([row]))) for row in range(len(batch))])

    def velocity(self, x: Tensor, timestep: Tensor, precomputed: Precomputed) -> Velocity:
        """Velocity like ``x`` ``[B, C, T, h, w]`` at ``timestep`` ``[B]`` in [0, 1000]."""
        return self._velocity(self.model, x, timestep, precomputed)

    def fast_velocity(self, x: Tensor, timestep: Tensor, precomputed: Precomputed) -> Velocity:
        """:meth:`velocity` by the approximate twin, if there is one."""
        return self._fast_velocity(x, timestep, precomputed, None)

    def _fast_velocity(
        self, x: Tensor, timestep: Tensor, precomputed: Precomputed, kept: BlockResidual | None
    ) -> Velocity:
        probe = None if self.fast is None else self.fast.execution.probe
        if probe is not None and not probe.settled:
            probe.at(float(timestep[0]) / 1000.0)
        return self._velocity(self.fast or self.model, x, timestep, precomputed, kept)

    def _reuse(self) -> Reuse | None:
        """The fast velocity in two parts, as ``reuse`` says."""
        if self.reuse == "off":
            return None
        if self.reuse == "velocity":
            return Reuse.of_velocity(self.fast_velocity)

        def evaluate(x: Tensor, timestep: Tensor, precomputed: Precomputed) -> tuple[Velocity, BlockResidual]:
            kept = BlockResidual()
            return self._fast_velocity(x, timestep, precomputed, kept), kept

        return Reuse(evaluate, self._fast_velocity)

    def exact(self) -> RetakePolicy:
        """This policy without any approximation."""
        return replace(self, fast=None, reuse="off")

    def phased(self) -> PhasedPolicy:
        """Rule R2: stochastic steps, and those before them, run what the learner runs, later ones the fast twin."""
        return PhasedPolicy(window=self.velocity, tail=self.fast_velocity, reuse=self._reuse())

    def _velocity(
        self,
        model: RetakeDiT,
        x: Tensor,
        timestep: Tensor,
        precomputed: Precomputed,
        kept: BlockResidual | None = None,
    ) -> Velocity:
        value = model(x, timestep, precomputed.conditioning, precomputed.cache, kept)
        if not precomputed.cache.negative:
            return Velocity(value)
        under_prompt, under_negative = value.chunk(2)
        return Velocity(under_prompt, under_negative, self.guidance)

    def latent_shape(self, batch: RetakeBatch) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the noisy latents of one retake; a given first frame is not among them."""
        _, frames, _, height, width = batch.source.video.shape
        channels, latent_frames, rows, columns = self.codec.latent_shape(frames, height, width)
        return channels, latent_frames - self.model.config.first_frame_given, rows, columns

    @torch.no_grad()
    def decode(self, latents: Tensor, source: Tensor) -> Tensor:
        """Videos ``[B, F, 3, H, W]`` in [-1, 1] of latents; a given first frame is that of the ``source`` videos."""
        video = self.codec.decode(latents).clamp(-1, 1)
        if self.model.config.first_frame_given:
            video = torch.cat([source[:, :1].to(video), video], dim=1)
        return video
