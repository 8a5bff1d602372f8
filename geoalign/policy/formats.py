"""Exported checkpoints: the files that the original inference code, and ours, read back."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoalign.config.model import ModelConfig
from geoalign.errors import CheckpointError, UsageError
from geoalign.files.atomic import atomic_folder, atomic_path, atomic_write_json
from geoalign.files.sealed import save_sealed
from geoalign.files.weights import require_finite
from geoalign.models.codec import PatchCodec
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import diffusers_name, is_self_attention
from geoalign.policy.files import save_codec_file
from geoalign.policy.locate import CODEC_FILE, CONFIG_FILE
from geoalign.policy.safetensors_file import save_safetensors

# Whose camera the readers of a format rebuild: ReDirector's phases lie in the self-attention, ReCamMaster's encoders in
# the full state dict. A diffusers folder names its model, and LoRA adds to a model that has its camera; both hold any.
_CAMERAS = {"redirector": ("learned",), "recammaster": ("modulated",)}
FORMATS = ("redirector", "recammaster", "diffusers", "lora")
SUFFIXES = {"redirector": (".safetensors",), "lora": (".safetensors",), "recammaster": (".ckpt", ".pt", ".pth")}
"""How the file of a format may end: readers choose the parser by it."""
WEIGHTS_FILE, CARD_FILE = "diffusion_pytorch_model.safetensors", "README.md"


def require_camera(config: ModelConfig, kind: str) -> None:
    """Raise UsageError, with the formats that would do, if readers of the format ``kind`` would lose the camera."""
    if config.camera not in _CAMERAS.get(kind, (config.camera,)):
        fitting = [name for name in FORMATS if config.camera in _CAMERAS.get(name, (config.camera,))]
        raise UsageError(
            f"--format {kind} is read as a model with camera={_CAMERAS[kind][0]}, and this one has "
            f"camera={config.camera}, which would be lost; formats that hold it: {', '.join(fitting)}"
        )


def export_redirector(model: RetakeDiT, path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Write the self-attention tensors alone, names relative to the transformer, as ReDirector's inference reads them.

    Args:
        model: a model with ReDirector's kind of camera.
        path: a ``.safetensors`` file.
        dtype: round to this type (bfloat16 keeps 8 significant bits); None keeps every bit.

    Returns:
        What was written, by name.

    Raises:
        UsageError: the model's camera is not ReDirector's, so that the readers of this format would lose it.
    """
    require_camera(model.config, "redirector")
    tensors = {name: value for name, value in _state(model, dtype).items() if is_self_attention(name)}
    save_safetensors(tensors, path)
    return tensors


def export_recammaster(model: RetakeDiT, path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Write the full state dict with torch, as ReCamMaster's inference reads it (strictly).

    Raises:
        UsageError: the model has other parameters than ReCamMaster's.
    """
    require_camera(model.config, "recammaster")
    tensors = _state(model, dtype)
    with atomic_path(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:  # its writer says so little of a full disk
            raise OSError(errno.EIO, f"torch could not write it: {str(error).splitlines()[0]}") from error
    return tensors


def save_pretrained(
    model: RetakeDiT,
    folder: Path,
    dtype: torch.dtype | None = None,
    codec: PatchCodec | None = None,
    card: str | None = None,
    listing: Path | None = None,
) -> dict[str, Tensor]:
    """Write a folder with ``config.json`` and safetensors in diffusers' names; appears complete or not at all.

    A patch codec lies beside them in ``codec.safetensors``, which diffusers does not look at; a VAE is not copied. A
    model ``card`` is its ``README.md``. The :func:`manifest` goes into the file ``listing`` just before the folder
    appears: who finds the folder finds both.
    A model without source video and cameras is a stock ``WanTransformer3DModel`` and loads as one. Camera modules have
    no home in that class: they keep their own names, and the door (:func:`geoalign.policy.open.describe`) reads them.

    Raises:
        CheckpointError: the folder exists already.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; remove it or choose another name")
    tensors = {diffusers_name(name): value for name, value in _state(model, dtype).items()}
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(diffusers_config(model.config), indent=2) + "\n", "utf-8")
        save_sealed(tensors, temporary / WEIGHTS_FILE, {"format": "pt"})
        if codec is not None:
            save_codec_file(temporary / CODEC_FILE, codec)
        if card is not None:
            (temporary / CARD_FILE).write_text(card, "utf-8")
        if listing is not None:
            atomic_write_json(listing, manifest(tensors))
    return tensors


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json``: diffusers' fields, and all of ours under ``retake``."""
    stock = config.camera == "none" and config.source == "none" and not config.pluecker_adapter
    return {
        "_class_name": "WanTransformer3DModel" if stock else "RetakeDiT",
        "patch_size": list(config.patch),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "rope_max_seq_len": 1024,
        "retake": config.model_dump(mode="json"),
    }


def manifest(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Totals and, per name, ``dtype shape``; repeated blocks are written once with ``{0..N-1}`` if all are equal."""
    rows = {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}
    merged: dict[tuple[str, str], list[int]] = {}
    for name, row in rows.items():
        head, dot, rest = name.partition("blocks.")
        number, _, tail = rest.partition(".")
        key = (f"{head}blocks.{{}}.{tail}", row) if dot and number.isdigit() else (name, row)
        merged.setdefault(key, []).append(int(number) if dot and number.isdigit() else -1)
    entries = {}
    for (pattern, row), numbers in merged.items():
        span = f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else str(numbers[0])
        entries[pattern.replace("{}", span)] = row
    return {"tensors": len(rows), "parameters": sum(t.numel() for t in tensors.values()), "entries": entries}


def _state(model: RetakeDiT, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters as they are written; raises CheckpointError for NaN and infinity, also where rounding made it."""
    return {
        name: require_finite("the model to export", name, value.detach().cpu().to(dtype or value.dtype).contiguous())
        for name, value in model.state_dict().items()
    }
