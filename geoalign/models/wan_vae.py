"""The Wan2.1 video autoencoder behind the LatentCodec protocol; the network is diffusers' ``AutoencoderKLWan``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoalign.errors import CheckpointError, UsageError
from geoalign.files.parsing import first_line
from geoalign.files.weights import TensorFile, shapes_of
from geoalign.models.checkpoint import place
from geoalign.models.layouts import summary
from geoalign.models.pretrained import check_pretrained, open_pretrained, read_settings
from geoalign.models.wan_decoder import make_lean

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}


def original_name(name: str, residual_blocks: int = 2) -> str:
    """Name in ``Wan2.1_VAE.pth`` of a diffusers parameter name."""
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = re.sub(r"^(encoder|decoder)\.(conv_in|norm_out|conv_out)", lambda m: f"{m[1]}.{_ENDS[m[2]]}", name)
    name = re.sub(r"mid_block\.((?:resnets|attentions)\.\d)", lambda m: _MIDDLE[m[1]], name)
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    per_stage = residual_blocks + 2  # resnets, then the upsampler
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{per_stage * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{per_stage * (int(m[1]) + 1) - 1}", name)
    if re.search(r"(downsamples|upsamples|middle)\.\d+\.", name):
        name = re.sub(r"\.(norm1|conv1|norm2|conv2)\.", lambda m: f".{_RESIDUAL[m[1]]}.", name)
        name = name.replace("conv_shortcut", "shortcut")
    return name


class WanCodec:
    """Pixels to normalised Wan latents: ``T = (F - 1) / 4 + 1`` frames of 1/8 size, 16 channels, unit variance.

    Args:
        vae: a diffusers autoencoder; its config holds the per-channel mean and standard deviation.
        tiled: encode and decode in overlapping tiles: less memory, faint differences at tile borders.
    """

    name = "wan_vae"
    frame_rule = "4k + 1"

    def __init__(self, vae: AutoencoderKLWan, *, tiled: bool = False) -> None:
        self.vae = vae.eval().requires_grad_(False)
        make_lean(vae)
        self.latent_channels = int(vae.config.z_dim)
        if tiled:
            vae.enable_tiling()
        self._mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def to(self, device: torch.device | str) -> WanCodec:
        """Move the network in place and return the codec."""
        self.vae.to(device)
        return self

    def check_frames(self, num_frames: int) -> None:
        """Raise UsageError naming the nearest accepted counts if ``num_frames`` is not 4k + 1."""
        if num_frames < 1 or num_frames % 4 != 1:
            below = max((num_frames - 1) // 4 * 4 + 1, 1)
            raise UsageError(f"the Wan VAE takes 4k + 1 frames, got {num_frames}; use {below} or {below + 4}")

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w); frame sizes must be multiples of 16 (8 of the VAE, 2 of the transformer's patches)."""
        self.check_frames(num_frames)
        if height % 16 or width % 16:
            near = f"{max(round(height / 16), 1) * 16} x {max(round(width / 16), 1) * 16}"
            raise UsageError(f"frame size {height} x {width} is not a multiple of 16; use {near}")
        return self.latent_channels, (num_frames - 1) // 4 + 1, height // 8, width // 8

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """``[B, F, 3, H, W]`` in [-1, 1] to float32 ``[B, C, T, h, w]``: the posterior mean, one video at a time."""
        self.latent_shape(video.shape[1], *video.shape[-2:])
        clips = video.transpose(1, 2).to(self.vae.dtype)
        means = torch.cat([self.vae.encode(clip[None]).latent_dist.mode().float() for clip in clips])
        return (means - self._mean.to(means)) / self._std.to(means)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``[B, C, T, h, w]`` to float32 ``[B, F, 3, H, W]``; diffusers clamps the result to [-1, 1]."""
        raw = (latents * self._std.to(latents) + self._mean.to(latents)).to(self.vae.dtype)
        return torch.cat([self.vae.decode(z[None]).sample.float() for z in raw]).transpose(1, 2)


def load_wan_codec(
    path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tiled: bool = False
) -> WanCodec:
    """Load ``Wan2.1_VAE.pth`` or a diffusers ``vae`` folder.

    Raises:
        CheckpointError: missing, damaged, or another model's weights.
    """
    if path.is_dir():
        from diffusers import AutoencoderKLWan

        vae: Any = open_pretrained(AutoencoderKLWan, path, "diffusers AutoencoderKLWan folder", torch_dtype=dtype)
        return WanCodec(vae.to(device), tiled=tiled)
    vae = _on_meta()
    fill_vae(vae, path, dtype, device)
    return WanCodec(vae, tiled=tiled)


def empty_wan_codec(path: Path) -> WanCodec:
    """The codec at ``path`` without weights, for its rules of length and size.

    Raises:
        CheckpointError: a folder whose settings cannot be read.
    """
    if not path.is_dir():
        return WanCodec(_on_meta())
    from diffusers import AutoencoderKLWan

    settings = read_settings(path)
    try:
        with torch.device("meta"):
            vae: Any = AutoencoderKLWan.from_config(settings)
    except Exception as error:  # of whatever the settings are given to
        raise CheckpointError(f"{path}: not a diffusers AutoencoderKLWan folder ({first_line(error)})") from error
    return WanCodec(vae)


def check_wan_codec(path: Path) -> str:
    """Look at what :func:`load_wan_codec` would load, by headers; a few words about it, and the same errors."""
    if path.is_dir():
        return check_pretrained(path, "diffusers AutoencoderKLWan folder", ("AutoencoderKLWan",))
    return summary(_opened(_on_meta(), path).shapes)


def fill_vae(vae: AutoencoderKLWan, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Place the tensors of an original-layout file into a diffusers autoencoder, strictly."""
    place(vae, [_opened(vae, path)], dtype, device)


def _on_meta() -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan()


def _opened(vae: AutoencoderKLWan, path: Path) -> TensorFile:
    """The file's tensors under the names of ``vae``, which they fit."""
    blocks = int(vae.config.num_res_blocks)
    names = {original_name(name, blocks): name for name in vae.state_dict()}
    source = TensorFile(path).renamed(lambda name: names.get(name, name))
    return source.require(shapes_of(vae.state_dict()), "is not a Wan2.1 VAE")
