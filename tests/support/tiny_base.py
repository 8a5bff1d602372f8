"""Base weights as published, scaled down: transformer, autoencoder, and a delta that was "trained" on top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from training_cases import smoke

from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import is_self_attention
from geoalign.policy.formats import save_pretrained, save_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

MODEL = {
    "dim": 96, "heads": 4, "layers": 2, "ffn_dim": 128, "in_channels": 32, "out_channels": 16, "patch": (1, 2, 2),
    "text_dim": 16, "text_length": 8, "freq_dim": 32, "rope_theta": (1e4, 1e4), "rope_scale": (1.0, 1.0),
    "source": "frames", "first_frame_given": False, "camera": "learned", "pluecker_adapter": True, "time_stride": 4,
    "space_stride": 8, "data_variance": None, "timestep_dtype": "bfloat16",
}  # fmt: skip


def tiny_vae() -> AutoencoderKLWan:
    """The autoencoder of :data:`MODEL`, with random weights."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                            temperal_downsample=[False, True, True])  # fmt: skip


def write_base(folder: Path, delta: Path, **changes: object) -> None:
    """Random weights in bfloat16 as published, of :data:`MODEL` with ``changes``."""
    torch.manual_seed(0)
    model = RetakeDiT(smoke(model=MODEL | changes, codec={"kind": "wan_vae"}).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.bfloat16()
    save_pretrained(model, folder)
    tiny_vae().save_pretrained(folder / "vae")
    delta.parent.mkdir(parents=True, exist_ok=True)
    trained = {n: (p + 0.01).contiguous() for n, p in model.state_dict().items() if is_self_attention(n)}
    save_safetensors(trained, delta)
