"""A policy as one file: weights, codec statistics and the settings that rebuild both, in one safetensors file.

The names and formats of the other files that hold a trained model (run folder, checkpoint folder) are here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from geoalign.config.model import ModelConfig
from geoalign.config.training import CodecConfig
from geoalign.errors import CheckpointError, ConfigError, argument
from geoalign.files.atomic import atomic_path
from geoalign.files.parsing import parse_json, read_json_object
from geoalign.files.sealed import SKIP_HINT, digest_of, header_digest, notice_unsealed, save_sealed, skips_checksums
from geoalign.files.weights import TensorFile, require_finite, shapes_of
from geoalign.models.checkpoint import resemblance
from geoalign.models.codec import PatchCodec
from geoalign.models.dit import RetakeDiT, init_tiny_
from geoalign.models.layouts import is_self_attention, model_shapes
from geoalign.policy.policy import RetakePolicy

# In a run folder.
RUN_CONFIG, POLICY_FILE, DELTA_FILE = "config.yaml", "policy.safetensors", "delta.safetensors"
# In a checkpoint folder (geoalign.files.checkpoints names it).
CHECKPOINT_FORMAT, STATE_FILE, AVERAGE_FILE = 1, "state.json", "average.safetensors"
_PARTS_KEY, _SEAL_KEY = "parts", "sha256"  # in the state: of the files beside it, and of the state itself

_KIND = "geoalign-policy"
Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyFile:
    """A policy file whose header was read and checked; its weights are read when asked for.

    Attributes:
        config: the model.
        weights: its tensors.
        codec: the patch codec in the file; None if the settings name a video autoencoder.
        notes: provenance (command, seed, numbers).
    """

    config: ModelConfig
    weights: TensorFile
    codec: PatchCodec | None
    notes: Mapping[str, Any]


def read_policy_file(path: Path) -> PolicyFile:
    """Open a policy file.

    Raises:
        CheckpointError: missing, truncated, of another kind, or tensors that do not fit its own settings.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a geoalign policy file (those end in .safetensors); {_on_top()}")
    return check_policy_file(TensorFile(path))


def is_policy_file(file: TensorFile) -> bool:
    """Whether the header says so."""
    return file.metadata.get("kind") == _KIND


def check_policy_file(file: TensorFile) -> PolicyFile:
    """The contents of an opened policy file; raises CheckpointError as :func:`read_policy_file` does."""
    path, kind = file.path, file.metadata.get("kind")
    if not is_policy_file(file):
        delta = "a delta; " if all(map(is_self_attention, file.shapes)) else ""
        raise CheckpointError(f"{path}: {delta}not a geoalign policy file (header kind {kind!r}); {_on_top()}")
    if not file.sealed:
        notice_unsealed(path)
    config = _settings(file, "model", ModelConfig)
    weights = file.part("model.").require(model_shapes(config), "is not a geoalign policy", resemblance)
    if strangers := [name for name in file.shapes if not name.startswith(("model.", "codec."))]:
        raise CheckpointError(f"{path}: {len(strangers)} unexpected tensors: {', '.join(strangers[:3])}")
    notes = parse_json(file.metadata.get("notes", "{}"), f"{path}: notes in its header", CheckpointError)
    if not isinstance(notes, dict):
        raise CheckpointError(f"{path}: notes in its header are no JSON object")
    return PolicyFile(config, weights, _codec(file), notes)


def _on_top() -> str:
    delta, model = argument("checkpoint", python="delta=FILE"), argument("model", python="its path")
    return f"weights trained on top of a model are given with {delta} (train.delta), that model with {model}"


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
    for name, value in tensors.items():
        require_finite(path, name, value)
    with atomic_path(path) as temporary:
        save_sealed(tensors, temporary, header)


def read_codec_file(path: Path) -> PatchCodec | None:
    """The patch codec in the ``codec.safetensors`` of an exported folder.

    Raises:
        CheckpointError: settings or tensors are missing or damaged.
    """
    return _codec(TensorFile(path))


def save_codec_file(path: Path, codec: PatchCodec) -> None:
    """Write what :func:`read_codec_file` reads."""
    settings = CodecConfig(kind="patch", patch=codec.patch, luma=codec.luma, chroma=codec.chroma)
    buffers = {f"codec.{name}": value.cpu() for name, value in codec.named_buffers()}
    save_sealed(buffers, path, {"codec": settings.model_dump_json()})


def _codec(file: TensorFile) -> PatchCodec | None:
    settings, tensors = _settings(file, "codec", CodecConfig), file.part("codec.")
    if settings.kind != "patch":
        tensors.require({}, "is no geoalign policy (its autoencoder is the Wan VAE, which no policy file holds)")
        return None
    codec = build_codec(settings)
    tensors.require(shapes_of(dict(codec.named_buffers())), "is not a geoalign codec")
    codec.load_state_dict(dict(tensors.items()))
    return codec


def _settings(file: TensorFile, part: str, kind: type[Settings]) -> Settings:
    """The settings of ``part`` ("model", "codec") in the header of a geoalign file."""
    if part not in file.metadata:
        raise CheckpointError(f"{file.path}: not a geoalign policy file (its header holds no {part} settings)")
    try:
        return kind.model_validate_json(file.metadata[part])
    except ValidationError as error:
        raise CheckpointError(f"{file.path}: invalid {part} settings in its header ({first_problem(error)})") from None


def first_problem(error: ValidationError) -> str:
    """The first problem in one line."""
    found = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"])))


def read_checkpoint_state(folder: Path) -> dict[str, Any]:
    """The counters and notes of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    try:
        state = read_json_object(folder / STATE_FILE, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error}); delete it, use an older one") from error
    if (found := state.get("format")) != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {found!r}, this version reads {CHECKPOINT_FORMAT}")
    types = {"iteration": int, "config": str, "settings": dict, "notes": dict}
    told = {"settings": {}, **state}  # older states have none
    wrong = [key for key, kind in types.items() if not isinstance(told.get(key), kind)]
    if wrong or state["iteration"] < 0:
        raise CheckpointError(
            f"{folder / STATE_FILE}: no usable {', '.join(wrong) or 'iteration'}; use an older checkpoint"
        )
    if not {_PARTS_KEY, _SEAL_KEY} & state.keys():
        notice_unsealed(folder)
    elif not skips_checksums() and state.get(_SEAL_KEY) != digest_of(_unsealed(state)):
        raise CheckpointError(f"{folder / STATE_FILE}: damaged (it differs from its checksum); {SKIP_HINT}")
    return state


def checkpoint_state(
    iteration: int, config: str, settings: Mapping[str, Any], notes: Mapping[str, Any], parts: Mapping[str, str]
) -> dict[str, Any]:
    """What :func:`read_checkpoint_state` reads.

    Args:
        iteration: iterations done.
        config: hash of ``settings``.
        settings: of the run, by dotted key.
        notes: JSON values carried along.
        parts: header checksums of the files beside it, by name.
    """
    state: dict[str, Any] = {"format": CHECKPOINT_FORMAT, "iteration": iteration, "config": config}
    state |= json.loads(json.dumps({"settings": dict(settings), "notes": dict(notes)}))  # keys as they will be read
    state[_PARTS_KEY] = dict(parts)
    return state | {_SEAL_KEY: digest_of(state)}


def check_part(state: Mapping[str, Any], file: TensorFile) -> TensorFile:
    """The file if it is the one that was written beside ``state``; raises CheckpointError."""
    listed = state.get(_PARTS_KEY, {})
    if listed and not skips_checksums() and listed.get(file.path.name) != header_digest(file.metadata):
        raise CheckpointError(f"{file.path}: belongs to another checkpoint than {STATE_FILE} beside it; {SKIP_HINT}")
    return file


def _unsealed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != _SEAL_KEY}


def build_codec(config: CodecConfig) -> PatchCodec:
    """The codec of a configuration.

    Raises:
        ConfigError: the codec needs files that only ``train.base`` can name.
    """
    if config.kind != "patch":
        raise ConfigError("codec.kind=wan_vae is loaded from a model folder: set train.base to that folder")
    return PatchCodec(config.patch, config.luma, config.chroma)


def new_policy(model: ModelConfig, codec: CodecConfig, seed: int) -> RetakePolicy:
    """A policy with fresh weights, reproducible from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RetakeDiT(model)
        init_tiny_(network)
    return RetakePolicy(network, build_codec(codec))
