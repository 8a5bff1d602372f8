"""The door: whatever a user calls "the model" (``geoalign.policy.locate``), opened once, checked by its headers, loaded
when asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.errors import CheckpointError, ConfigError, UsageError, argument
from geoalign.files.weights import Shapes, TensorFile
from geoalign.models.checkpoint import (
    LoadReport,
    complete_weights,
    load_dit,
    redirector_weights,
    resemblance,
    title_of,
)
from geoalign.models.codec import PatchCodec
from geoalign.models.codec_base import LatentCodec
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import LAYOUTS, RECAMMASTER, REDIRECTOR, count, identify, is_self_attention, model_shapes
from geoalign.models.wan_vae import check_wan_codec, empty_wan_codec, load_wan_codec
from geoalign.policy.files import check_policy_file, is_policy_file, read_codec_file, read_policy_file
from geoalign.policy.locate import CODEC_FILE, Location, existing, locate, vae_of, weights_folder
from geoalign.policy.policy import RetakePolicy


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """The opened files of one model: headers are read and checked, weights are not read yet.

    Attributes:
        location: what was named and where it lies.
        config: the model.
        parts: weights in the order in which they are placed; later ones replace earlier ones.
        patch: the patch codec; None if the codec is a video autoencoder in ``location.home``.
        notes: provenance in the header of a policy file; empty for anything else.
    """

    location: Location
    config: ModelConfig
    parts: tuple[TensorFile, ...]
    patch: PatchCodec | None
    notes: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The published model, or its size."""
        return title_of(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the transformer has."""
        return count(model_shapes(self.config))["parameters"]

    def network(
        self, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[RetakeDiT, LoadReport]:
        """Read the transformer's weights; ``dtype`` None keeps each tensor as stored."""
        return load_dit(self.config, self.parts, dtype=dtype, device=device)

    def codec(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tiled: bool = False
    ) -> LatentCodec:
        """The codec; ``dtype`` and ``tiled`` are of a video autoencoder.

        Raises:
            CheckpointError: the video autoencoder is missing or damaged.
        """
        return _codec_at(self.location.home, self.patch, dtype, device, tiled)

    def codec_rules(self) -> LatentCodec:
        """The codec for its rules alone: which lengths and sizes it takes; a video autoencoder has no weights."""
        return self.patch if self.patch is not None else empty_wan_codec(vae_of(self.location.home))

    def check_codec(self) -> None:
        """Look at a video autoencoder by its headers; raises what :meth:`codec` would."""
        if self.patch is None:
            check_wan_codec(vae_of(self.location.home))

    def policy(
        self,
        *,
        dtype: torch.dtype | None = torch.float32,
        codec_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RetakePolicy:
        """Transformer and codec."""
        return RetakePolicy(self.network(dtype=dtype, device=device)[0], self.codec(dtype=codec_dtype, device=device))


def open_policy(name: Path | str, delta: Path | None = None, *, device: torch.device | str = "cpu") -> RetakePolicy:
    """Load the policy that a name stands for, frozen, in float32; :func:`describe` says what may be named."""
    policy = describe(name, delta).policy(device=device)
    policy.model.requires_grad_(False)
    return policy


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
    return describe_base(config).policy(dtype=None, codec_dtype=dtype, device=device)


def describe_base(config: Config) -> ModelFiles:
    """The opened files of the policy that a run starts from; arguments and errors are those of :func:`open_base`."""
    if config.train.base is None:
        example = "a folder of published weights with train.delta (docs/real-weights.md)"
        if config.codec.kind == "patch":
            example = "builtin:tiny_base, or a policy file (geoalign pretrain makes one)"
        raise ConfigError(f"train.base is not set: give {example}")
    files = describe(config.train.base, config.train.delta)
    wanted, found = config.model.model_dump(), files.config.model_dump()
    if different := [key for key, value in wanted.items() if found[key] != value]:
        listed = ", ".join(f"model.{key} is {found[key]!r} there, {wanted[key]!r} here" for key in different[:3])
        raise ConfigError(
            f"{files.location.home}: the weights are of another model than the configuration describes: {listed}"
        )
    return files


def describe(name: Path | str, delta: Path | None = None) -> ModelFiles:
    """Open the files of a model and check names, shapes and types of all tensors; no weight is read.

    Args:
        name: anything that :mod:`geoalign.policy.locate` lists.
        delta: what was trained on top: a ReDirector or geoalign delta (self-attention only) or, on published weights,
            a complete state dict such as ReCamMaster's ``.ckpt``.

    Raises:
        CheckpointError: files that are missing, damaged, of another kind, or do not belong together.
        UsageError: published base weights without anything that makes a retake model of them.
    """
    location = locate(name, delta)
    home, steps = location.home, list(location.steps)
    patch, notes = None, {}
    if home.is_file():
        stored = read_policy_file(home)
        config, parts, patch, notes = stored.config, [stored.weights], stored.codec, stored.notes
    elif location.exported is not None:
        config, patch = location.exported, patch_codec(home)
        parts = [complete_weights(config, TensorFile(weights_folder(home)))]
    else:
        config, parts = _published(home, steps.pop(0).file if steps else None)
    found = config.model_dump(mode="json")
    if different := [key for key, value in location.trained_as.items() if found.get(key, value) != value]:
        listed = ", ".join(f"{key} was {location.trained_as[key]!r} and is {found[key]!r}" for key in different[:3])
        raise CheckpointError(
            f"{location.steps[-1].file}: was trained on another model than {home} is by now: {listed}; give a policy "
            "file, which holds all weights"
        )
    for step in steps:
        trained = {n: shape for n, shape in model_shapes(config).items() if re.search(step.pattern, n)}
        verdict = f"is not the trained part ({step.pattern}) of {title_of(config)}"
        parts.append(TensorFile(step.file).require(trained, verdict, resemblance))
    return ModelFiles(location, config, tuple(parts), patch, notes)


def _published(folder: Path, trained: Path | None) -> tuple[ModelConfig, list[TensorFile]]:
    """Published weights with the file that makes a retake model of them."""
    weights = TensorFile(weights_folder(folder))
    if trained is None:
        nearest = identify(weights.shapes)[0]
        found = LAYOUTS[nearest].title if nearest else "of an unknown layout"
        raise UsageError(
            f"{folder}: a base model ({found}) cannot retake videos by itself; give what was trained on top with "
            f"{argument('checkpoint', python='delta=FILE')} (train.delta)"
        )
    delta = TensorFile(trained)
    if all(map(is_self_attention, delta.shapes)):
        return REDIRECTOR, list(redirector_weights(weights, delta, REDIRECTOR))
    return RECAMMASTER, [complete_weights(RECAMMASTER, delta)]


def tensor_shapes(name: Path | str) -> Shapes:
    """Names and shapes of the tensors that ``name`` holds, to say what it is: also of files that are no whole model.

    Of a policy file, a run and a checkpoint these are the model's; of all else those of the file or folder itself.
    """
    path = existing(name)
    if path.is_file():
        file = TensorFile(path)
        return check_policy_file(file).weights.shapes if is_policy_file(file) else file.shapes
    location = locate(name)
    if location.what in ("exported folder", "published weights"):
        return TensorFile(weights_folder(path)).shapes
    return model_shapes(describe(name).config)


def open_codec(
    name: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LatentCodec:
    """The codec of a model, whose transformer need not be complete; ``dtype`` is of a video autoencoder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    home = locate(name).home
    return _codec_at(home, patch_codec(home), dtype, device)


def patch_codec(home: Path) -> PatchCodec | None:
    """The patch codec in a policy file or in the ``codec.safetensors`` of an exported folder; None for a VAE.

    Raises:
        CheckpointError: settings or tensors of the codec are missing or damaged.
    """
    if home.is_file():
        return read_policy_file(home).codec
    path = home / CODEC_FILE
    return read_codec_file(path) if path.is_file() else None


def _codec_at(
    home: Path, patch: PatchCodec | None, dtype: torch.dtype, device: torch.device | str, tiled: bool = False
) -> LatentCodec:
    if patch is not None:
        return patch.to(device)
    return load_wan_codec(vae_of(home), dtype=dtype, device=str(device), tiled=tiled)
