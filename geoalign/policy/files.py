"""A policy as one file: weights, codec statistics and the settings that rebuild both, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.config.training import CodecConfig
from geoalign.errors import CheckpointError, ConfigError
from geoalign.io_utils import atomic_path
from geoalign.models.codec import PatchCodec
from geoalign.models.dit import RetakeDiT
from geoalign.policy.open import apply_delta, header_settings, open_codec, open_model
from geoalign.policy.policy import RetakePolicy
from geoalign.training.engines.snapshot import copy_strictly

_KIND = "geoalign-policy"


def build_codec(config: CodecConfig) -> PatchCodec:
    """The codec of a configuration.

    Raises:
        ConfigError: the codec needs files that only ``train.base`` can name.
    """
    if config.kind != "patch":
        raise ConfigError("codec.kind=wan_vae is loaded from a model folder: set train.base to that folder")
    return PatchCodec(config.patch, config.luma, config.chroma)


def open_base(config: Config, device: torch.device, dtype: torch.dtype) -> RetakePolicy:
    """The policy that a run starts from, weights in the precision of their files.

    Args:
        config: names the base, what was trained on top of it, and the model that they must be.
        device: where model and codec go.
        dtype: of a video autoencoder.

    Raises:
        ConfigError: no base is named, or the model section describes another model than the weights are.
        CheckpointError: files that are missing, damaged or do not belong together.
    """
    if config.train.base is None:
        raise ConfigError(
            "train.base is not set: give a policy file (geoalign pretrain makes one), a folder of published weights "
            "with train.delta, or builtin:tiny_base"
        )
    path, delta = resolve_base(config.train.base), config.train.delta
    if path.is_dir():
        model, _ = open_model(path, delta, dtype=None, device=str(device))
        policy = RetakePolicy(model, open_codec(path, dtype=dtype, device=str(device)))
    else:
        policy, _ = load_policy(path)
        if delta is not None:
            apply_delta(policy.model, delta, None)
    wanted, found = config.model.model_dump(), policy.model.config.model_dump()
    if different := [key for key, value in wanted.items() if found[key] != value]:
        listed = ", ".join(f"model.{key} is {found[key]!r} there, {wanted[key]!r} here" for key in different[:3])
        raise ConfigError(f"{path}: the weights are of another model than the configuration describes: {listed}")
    return policy


def save_policy(
    path: Path,
    policy: RetakePolicy,
    codec: CodecConfig,
    notes: Mapping[str, Any],
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and codec weights with their settings and ``notes`` (provenance: command, seed, numbers).

    ``trained`` replaces parameters by name (masters in full precision).
    """
    state = policy.model.state_dict() | dict(trained or {})
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    if isinstance(policy.codec, PatchCodec):
        tensors["codec.channel_std"] = policy.codec.channel_std.cpu()
    header = {
        "kind": _KIND,
        "model": policy.model.config.model_dump_json(),
        "codec": codec.model_dump_json(),
        "notes": json.dumps(dict(notes)),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def resolve_base(name: Path) -> Path:
    """Path of a policy file; ``builtin:NAME`` names one that ships with the package."""
    text = str(name)
    if text.startswith("builtin:"):
        folder = Path(str(resources.files("geoalign"))) / "_assets"
        path = folder / f"{text.removeprefix('builtin:')}.safetensors"
        if not path.exists():
            shipped = ", ".join(sorted(f"builtin:{file.stem}" for file in folder.glob("*.safetensors")))
            raise CheckpointError(f"{text}: no such built-in policy (there are: {shipped or 'none'})")
        return path
    return name


def load_policy(name: Path) -> tuple[RetakePolicy, dict[str, Any]]:
    """Load a policy file; returns the policy and its notes.

    Raises:
        CheckpointError: missing, truncated, not a policy file, or keys that do not fit its own settings.
    """
    path = resolve_base(name)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such policy file; make one with `geoalign pretrain` or use builtin:tiny_base"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no __iter__
        if header.get("kind") != _KIND:
            raise CheckpointError(
                f"{path}: a safetensors file, but not a geoalign policy (header kind {header.get('kind')!r})"
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable policy file ({error}); it may be truncated") from error
    model = RetakeDiT(header_settings(path, "model", ModelConfig))
    codec = build_codec(header_settings(path, "codec", CodecConfig))
    copy_strictly(_part(tensors, "model."), model.state_dict(), str(path))
    copy_strictly(_part(tensors, "codec."), dict(codec.named_buffers()), str(path))
    rest = [key for key in tensors if not key.startswith(("model.", "codec."))]
    if rest:
        raise CheckpointError(f"{path}: unexpected tensors {rest[:3]} ({len(rest)} in all)")
    return RetakePolicy(model, codec), json.loads(header.get("notes", "{}"))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def new_policy(model: ModelConfig, codec: CodecConfig, seed: int) -> RetakePolicy:
    """A policy with fresh weights, reproducible from ``seed``."""
    from geoalign.models.dit import init_tiny_

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RetakeDiT(model)
        init_tiny_(network)
    return RetakePolicy(network, build_codec(codec))
