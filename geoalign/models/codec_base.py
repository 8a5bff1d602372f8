"""The codec protocol between pixels and latents; the Wan VAE and the embedded patch codec implement it."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LatentCodec(Protocol):
    """Maps videos ``[B, F, 3, H, W]`` in [-1, 1] to normalised latents ``[B, C, T, h, w]`` and back.

    Attributes:
        name: registered name, written into caches and checkpoints.
        frame_rule: the accepted frame counts in words, for error messages (``"any"``, ``"4k + 1"``).
        latent_channels: C.
    """

    name: str
    frame_rule: str
    latent_channels: int

    def to(self, device: torch.device) -> Self:
        """Move the codec in place and return it."""
        ...

    def check_frames(self, num_frames: int) -> None:
        """Raise UsageError naming the nearest accepted counts if ``num_frames`` cannot be encoded."""
        ...

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w) for a video of this size; raise UsageError if the size does not fit."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Encode to normalised latents (roughly unit variance per channel), float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents to a video; values may leave [-1, 1] and are not clamped here."""
        ...
