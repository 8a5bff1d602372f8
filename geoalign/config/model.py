"""Settings of the video transformer: one class, from the embedded default's 0.5 M parameters to Wan2.1-1.3B."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from geoalign.config.base import Section


class ModelConfig(Section):
    """A Wan2.1 video transformer with an optional source video and optional camera control.

    The defaults are Wan2.1-T2V-1.3B without a source video. ``geoalign.models.layouts`` holds the published layouts.
    """

    dim: int = Field(1536, gt=0, le=65536)
    """Width of the token stream."""
    heads: int = Field(12, gt=0, le=1024)
    """Attention heads; ``dim / heads`` must be even and split into three rotary axes (24, 32 and 128 do)."""
    layers: int = Field(30, gt=0, le=1024)
    """Transformer blocks."""
    ffn_dim: int = Field(8960, gt=0, le=262144)
    """Hidden width of the feed-forward part."""
    in_channels: int = Field(16, gt=0, le=4096)
    """Channels of the patch embedding; latents with fewer channels are padded with zeros."""
    out_channels: int = Field(16, gt=0, le=4096)
    """Latent channels of the predicted velocity."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    text_dim: int = Field(4096, gt=0, le=65536)
    """Width of the text encoder's output; a model that reads no text gets one zero token of this width."""
    text_length: int = Field(512, gt=0, le=65536)
    """Text tokens; shorter prompts are padded with zero vectors, which take part in attention."""
    freq_dim: int = Field(256, gt=0, le=65536)
    """Width of the sinusoidal time embedding."""
    image_dim: int | None = Field(None, gt=0, le=65536)
    """Width of CLIP image tokens (1280); None: no image branch."""
    eps: float = Field(1e-6, gt=0)
    """Epsilon of all norms outside the image projector."""
    rope_theta: tuple[float, float] = (10000.0, 10000.0)
    """Base of the rotary frequencies along time and along space."""
    rope_scale: tuple[float, float] = (1.0, 1.0)
    """Highest rotary frequency along time (rad per latent frame) and along space (rad per token)."""
    rope_layout: Literal["shared", "sequential"] = "shared"
    """Rotary frame index of source tokens: the same as the target (ReDirector), or counted on (ReCamMaster)."""
    source: Literal["none", "frames"] = "none"
    """Whether clean source latents are joined to the noisy target on the frame axis (target first)."""
    first_frame_given: bool = False
    """Whether latents hold only target frames 1.. because target frame 0 is the source's frame 0."""
    camera: Literal["none", "learned", "geometric", "modulated"] = "none"
    """Where camera control enters.

    ``learned``: ReDirector, rotary phases from the Pluecker adapter. ``geometric``: rotary phases from ray-ground
    intersections with learnable gains. ``modulated``: ReCamMaster, poses added to the self-attention input.
    """
    pluecker_adapter: bool = False
    """Whether the Pluecker adapter of Wan-Fun-Control-Camera adds camera tokens to the patch embedding."""
    time_stride: Literal[1, 4] = 4
    """Video frames per latent frame after the first (4 for the Wan VAE)."""
    space_stride: int = Field(8, gt=0, le=1024)
    """Pixels per latent row and column (8 for the Wan VAE)."""
    timestep_dtype: Literal["float32", "bfloat16"] = "float32"
    """Rounding of the timestep where it enters the network; ReDirector was trained with bfloat16-rounded timesteps."""
    data_variance: float | None = Field(None, gt=0)
    """Output preconditioning: variance of the data, or None when the network output is the velocity itself (Wan)."""

    def tokens(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Target and source tokens of a video of that many frames and pixels."""
        time, rows, columns = self.patch
        latent_frames = (frames - 1) // self.time_stride + 1
        plane = (height // self.space_stride // rows) * (width // self.space_stride // columns)
        target = (latent_frames - self.first_frame_given) // time * plane
        return target, latent_frames // time * plane if self.source == "frames" else 0

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads

    @field_validator("patch", "rope_theta", "rope_scale")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < number < 2**40 for number in value):
            raise ValueError(f"must hold positive numbers, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.dim % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"model.dim={self.dim} with model.heads={self.heads} gives head dimension "
                f"{self.dim / self.heads:g}; it must be an even whole number of at least 6"
            )
        # Two published formulas split a head into time/row/column parts; a checkpoint is unambiguous where they agree.
        if self.head_dim // 3 != 2 * (self.head_dim // 6):
            raise ValueError(
                f"head dimension {self.head_dim} (model.dim / model.heads) has no unambiguous 3-D rotary "
                "split; use 24, 32, 48 or 128"
            )
        if self.camera == "learned" and not self.pluecker_adapter:
            raise ValueError("model.camera=learned takes its phases from the adapter; set model.pluecker_adapter=true")
        if self.camera in ("geometric", "modulated") and self.pluecker_adapter:
            raise ValueError(f"model.camera={self.camera} has no Pluecker adapter; set model.pluecker_adapter=false")
        if self.camera != "none" and self.source == "none":
            raise ValueError(f"model.camera={self.camera} relates target to source tokens; set model.source=frames")
        if self.first_frame_given and self.source == "none":
            raise ValueError(
                "model.first_frame_given needs the source video as the first frame; set model.source=frames"
            )
        if self.first_frame_given and (self.patch[0] != 1 or self.time_stride != 1):
            raise ValueError(
                "model.first_frame_given needs one latent frame per video frame (patch[0] = time_stride = 1)"
            )
        return self
