"""Open whatever a user calls "the model": a geoalign policy file, an exported folder, or published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import safe_open

from geoalign.config.model import ModelConfig
from geoalign.config.training import CodecConfig
from geoalign.errors import CheckpointError, UsageError
from geoalign.models.checkpoint import LoadReport, TensorFile, check, load_dit, load_redirector, place
from geoalign.models.codec import PatchCodec
from geoalign.models.codec_base import LatentCodec
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import LAYOUTS, RECAMMASTER, REDIRECTOR, identify, is_self_attention, model_shapes
from geoalign.models.wan_vae import load_wan_codec

CONFIG_FILE = "config.json"
CODEC_FILE = "codec.safetensors"
Settings = TypeVar("Settings", bound=BaseModel)


def open_model(
    model: Path, checkpoint: Path | None = None, *, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> tuple[RetakeDiT, LoadReport]:
    """Load a transformer.

    Args:
        model: a geoalign policy file (``.safetensors``), a folder written by ``geoalign export --format diffusers``, or
            a folder with the published weights of a base model.
        checkpoint: what was trained on top: a ReDirector or geoalign delta (self-attention only) or a complete state
            dict such as ReCamMaster's ``.ckpt``.
        dtype: of the parameters; None keeps each as stored.
        device: where they go.

    Raises:
        CheckpointError: files that are missing, damaged or do not belong together.
        UsageError: published base weights without a checkpoint that makes a retake model of them.
    """
    if not model.exists():
        raise CheckpointError(f"{model}: no such model file or folder")
    if model.is_file():
        return _open_policy(model, checkpoint, dtype, device)
    config = read_config(model)
    if config is not None:
        network, report = load_dit(config, _weights(model), dtype=dtype, device=device)
        if checkpoint is not None:
            report = apply_delta(network, checkpoint, dtype, device)
        return network, report
    nearest = identify(TensorFile(_weights(model)).shapes)[0]
    if checkpoint is None:
        found = LAYOUTS[nearest].title if nearest else "of an unknown layout"
        raise UsageError(f"{model}: a base model ({found}) cannot retake videos by itself; give --checkpoint")
    holds = TensorFile(checkpoint).shapes
    if all(is_self_attention(name) for name in holds):
        return load_redirector(_weights(model), checkpoint, dtype=dtype, device=device)
    return load_dit(RECAMMASTER, checkpoint, dtype=dtype, device=device)


def config_of(model: Path, checkpoint: Path | None = None) -> ModelConfig:
    """The configuration that :func:`open_model` would use, from file headers alone; same errors."""
    if not model.exists():
        raise CheckpointError(f"{model}: no such model file or folder")
    if model.is_file():
        return header_settings(model, "model", ModelConfig)
    config = read_config(model)
    if config is not None:
        return config
    if checkpoint is None:
        raise UsageError(f"{model}: published base weights cannot retake videos by themselves; give --checkpoint")
    return REDIRECTOR if all(map(is_self_attention, TensorFile(checkpoint).shapes)) else RECAMMASTER


def apply_delta(model: RetakeDiT, delta: Path, dtype: torch.dtype | None, device: str = "cpu") -> LoadReport:
    """Replace all self-attention parameters of ``model`` by those of a file that holds exactly these."""
    source = TensorFile(delta)
    shapes = {n: s for n, s in model_shapes(model.config).items() if is_self_attention(n)}
    check(source, shapes, "the self-attention of this model")
    return place(model, source, dtype, device)


def read_config(folder: Path) -> ModelConfig | None:
    """The model settings of an exported folder, or None if the folder was not written by geoalign.

    Raises:
        CheckpointError: an unreadable or invalid ``config.json``.
    """
    for path in (folder / CONFIG_FILE, folder / "transformer" / CONFIG_FILE):
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text("utf-8"))
            if "retake" in settings:
                return ModelConfig.model_validate(settings["retake"])
        except ValidationError as error:
            raise CheckpointError(f"{path}: not a readable model configuration ({_problem(error)})") from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable model configuration ({error})") from error
    return None


def open_codec(
    model: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", tiled: bool = False
) -> LatentCodec:
    """The codec of a model: inside a policy file, ``codec.safetensors``, a ``vae`` folder, or ``Wan2.1_VAE.pth``.

    Raises:
        CheckpointError: none of these exists or can be read.
    """
    if (codec := patch_codec(model)) is not None:
        return codec.to(device)
    if model.is_file():
        raise CheckpointError(
            f"{model}: its autoencoder is the Wan VAE, which no policy file holds; run geoalign export --format "
            "diffusers and put the folder vae or Wan2.1_VAE.pth into the result"
        )
    for path in (model / "vae", model / "Wan2.1_VAE.pth"):
        if path.exists():
            return load_wan_codec(path, dtype=dtype, device=device, tiled=tiled)
    raise CheckpointError(
        f"{model}: no autoencoder; a folder vae or a file Wan2.1_VAE.pth is needed beside the weights"
    )


def patch_codec(model: Path) -> PatchCodec | None:
    """The patch codec in a policy file or in the ``codec.safetensors`` of an exported folder; None for a VAE.

    Raises:
        CheckpointError: settings or tensors of the codec are missing or damaged.
    """
    path = model if model.is_file() else model / CODEC_FILE
    if not path.is_file():
        return None
    settings = header_settings(path, "codec", CodecConfig)
    if settings.kind != "patch":
        return None
    codec = PatchCodec(settings.patch, settings.luma, settings.chroma)
    source = TensorFile(path).part("codec.")
    check(source, {name: tuple(b.shape) for name, b in codec.named_buffers()}, "a geoalign codec")
    codec.load_state_dict(dict(source.items()))
    return codec


def _weights(folder: Path) -> Path:
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def header_settings(path: Path, part: str, kind: type[Settings]) -> Settings:
    """The settings of ``part`` ("model", "codec") in the header of a geoalign file."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a geoalign policy file (those end in .safetensors)")
    TensorFile(path)  # refuses truncated files with one clear message
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if part not in header:
        raise CheckpointError(f"{path}: not a geoalign policy file (its header holds no {part} settings)")
    try:
        return kind.model_validate_json(header[part])
    except ValidationError as error:
        raise CheckpointError(f"{path}: invalid {part} settings in its header ({_problem(error)})") from None


def _problem(error: ValidationError) -> str:
    """The first problem in one line."""
    found = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"])))


def _open_policy(
    path: Path, checkpoint: Path | None, dtype: torch.dtype | None, device: str
) -> tuple[RetakeDiT, LoadReport]:
    config = header_settings(path, "model", ModelConfig)
    source = TensorFile(path).part("model.")
    check(source, model_shapes(config), "a geoalign policy")
    with torch.device("meta"):
        network = RetakeDiT(config)
    report = place(network, source, dtype, device)
    return (network, report) if checkpoint is None else (network, apply_delta(network, checkpoint, dtype, device))
