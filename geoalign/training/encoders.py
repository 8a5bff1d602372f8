"""What ``geoalign prepare`` computes of a window; built here because it joins models and the embedded world."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.codec_base import LatentCodec
from geoalign.training.bundle import load_policy, resolve_base
from geoalign.world.dataset import is_complete, write_world


class CodecEncoder:
    """Source latents by the policy's codec; clips bring their own metric cameras and captions.

    Args:
        codec: the codec of the policy.
        identity: names what the codec's weights are.
    """

    def __init__(self, codec: LatentCodec, identity: str) -> None:
        self._codec = codec
        self.identity: Mapping[str, str] = {"codec": codec.name, "weights": identity}

    @torch.no_grad()
    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        """``latents`` ``[C, T, h, w]`` of a window ``[F, 3, H, W]``."""
        return {"latents": self._codec.encode(frames[None])[0]}

    def caption(self, frames: Tensor) -> str | None:
        """No captioner."""
        return None

    def estimate_camera(self, frames: Tensor) -> tuple[CameraTrajectory, Tensor | None] | None:
        """No estimator."""
        return None


def build_encoder(config: Config) -> CodecEncoder:
    """The encoder of ``train.base``.

    Raises:
        ConfigError: no base policy is configured.
    """
    if config.train.base is None:
        raise ConfigError("train.base is not set: prepare encodes with the codec of the base policy")
    policy, _ = load_policy(config.train.base)
    digest = hashlib.sha256(resolve_base(config.train.base).read_bytes()).hexdigest()
    return CodecEncoder(policy.codec, digest)


def render_missing_data(config: Config, rank: int) -> None:
    """Render the embedded world into ``data.root`` if it is configured and missing (rank 0 only)."""
    if config.world is not None and not is_complete(config.data, config.world):
        if rank:
            raise ConfigError(f"{config.data.root}: not rendered yet; run `geoalign prepare` once without torchrun")
        write_world(config.data, config.world)
