"""Training from a folder of weights with the Wan autoencoder: what comes out is a delta that every other verb reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import smoke

from geoalign.cli.main import main
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.jobs.train import run_training
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import is_self_attention
from geoalign.policy.formats import save_pretrained, save_safetensors
from geoalign.policy.open import describe
from geoalign.training.checkpoint import RunSettings, list_checkpoints, load_checkpoint

MODEL = {
    "dim": 96, "heads": 4, "layers": 2, "ffn_dim": 128, "in_channels": 32, "out_channels": 16, "patch": (1, 2, 2),
    "text_dim": 16, "text_length": 8, "freq_dim": 32, "rope_theta": (1e4, 1e4), "rope_scale": (1.0, 1.0),
    "source": "frames", "first_frame_given": False, "camera": "learned", "pluecker_adapter": True, "time_stride": 4,
    "space_stride": 8, "data_variance": None, "timestep_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled-down model and autoencoder, and a delta that was "trained" on top, all in bfloat16 as published."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    model = RetakeDiT(smoke(model=MODEL, codec={"kind": "wan_vae"}).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.bfloat16()
    save_pretrained(model, folder / "base")
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])  # fmt: skip
    vae.save_pretrained(folder / "base" / "vae")
    delta = {n: (p + 0.01).contiguous() for n, p in model.state_dict().items() if is_self_attention(n)}
    save_safetensors(delta, folder / "delta.safetensors")
    return folder


def config_of(weights: Path, tmp_path: Path, **train: object) -> Config:
    return smoke(
        run={"dir": tmp_path / "run", "dtype": "bfloat16"},
        data={"root": tmp_path / "data"},
        codec={"kind": "wan_vae"},
        model=MODEL,
        optim={"lr": 1e-3, "groups": (), "eps": 1e-12, "ema": 0.0, "warmup": 0, "schedule": "constant"},
        train={"base": weights / "base", "delta": weights / "delta.safetensors", "iterations": 2} | train,
        groups={"rows_per_forward": 1},
        levers={"streaming": "host", "recompute": "keep_attention"},
        scoring={"chunk": 2},
    )


def test_a_run_starts_from_base_and_delta_and_leaves_a_delta(weights: Path, tmp_path: Path) -> None:
    config = config_of(weights, tmp_path)
    run_training(config)
    result = tmp_path / "run" / "delta.safetensors"
    start, found = load_file(weights / "delta.safetensors"), load_file(result)
    assert found.keys() == start.keys() and all(is_self_attention(name) for name in found)
    # Masters: the update of 2 x 1e-3 is far below the bfloat16 step of most weights and must not be lost.
    assert all(value.dtype == torch.float32 for value in found.values())
    moved = [float((found[n] - start[n].float()).abs().max()) for n in found if "rope_phase" not in n]
    assert min(moved) > 5e-4 and max(moved) < 5e-3
    saved = load_checkpoint(
        list_checkpoints(tmp_path / "run" / "checkpoints")[-1], config=RunSettings("", {}), allow_config_change=True
    )
    assert all(torch.equal(found[name], value) for name, value in saved.snapshot.values.items())
    model, _ = describe(weights / "base", result).network(dtype=None)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in found.items())
    exported = tmp_path / "exported.safetensors"
    command = ["export", "--format", "redirector", "--dtype", "bfloat16", "--out", str(exported)]
    assert main([*command, "--model", str(weights / "base"), "--checkpoint", str(result)]) == 0
    assert all(torch.equal(value, found[name].bfloat16()) for name, value in load_file(exported).items())


def test_a_model_section_that_does_not_fit_the_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    config = config_of(weights, tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"layers": 3})})
    with pytest.raises(ConfigError, match=r"another model than the configuration describes: model\.layers is 2 there"):
        run_training(config)
    assert not (tmp_path / "run").exists()
