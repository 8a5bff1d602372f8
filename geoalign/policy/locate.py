"""What a user's name for "the model" stands for: which files, of which kind; no weight is read.

A name may be ``builtin:NAME``, a policy file, a run folder (its trained policy), a checkpoint folder of a run (the
averaged weights), a folder written by ``geoalign export --format diffusers``, or a folder of published weights with
what was trained on top of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from geoalign.config.model import ModelConfig
from geoalign.config.training import compiles
from geoalign.errors import CheckpointError
from geoalign.files.checkpoints import iteration_of
from geoalign.files.parsing import read_json_object
from geoalign.files.yaml_text import read_yaml
from geoalign.policy.files import (
    AVERAGE_FILE,
    DELTA_FILE,
    POLICY_FILE,
    RUN_CONFIG,
    STATE_FILE,
    first_problem,
    read_checkpoint_state,
)

CONFIG_FILE = "config.json"
CODEC_FILE = "codec.safetensors"
_SELF_ATTENTION = "self_attn"


@dataclass(frozen=True, slots=True)
class Step:
    """A file that replaces the parameters whose names match ``pattern``, and no others."""

    file: Path
    pattern: str = _SELF_ATTENTION


@dataclass(frozen=True, slots=True)
class Location:
    """Which files a name stands for; nothing is opened yet.

    Attributes:
        what: the kind of thing that was named, in words.
        home: a policy file, or the folder with base weights, autoencoder, text and image encoder.
        steps: what was trained on top, first to last.
        exported: the model settings of an exported folder.
        trained_as: the model settings of the run that trained the last step, by name; empty if there was none.
    """

    what: str
    home: Path
    steps: tuple[Step, ...] = ()
    exported: ModelConfig | None = None
    trained_as: Mapping[str, Any] = field(default_factory=dict)


def locate(name: Path | str, delta: Path | None = None) -> Location:
    """Which files ``name`` stands for, with ``delta`` on top.

    Raises:
        CheckpointError: it does not exist, or a run folder that does not hold what its settings name.
    """
    path = existing(name)
    if path.is_file():
        found = Location("policy file", path)
    elif iteration_of(path) is not None or (path / STATE_FILE).is_file():
        read_checkpoint_state(path)
        found = _on_its_base(path.absolute().parent.parent, path / AVERAGE_FILE, "checkpoint")
    elif (path / RUN_CONFIG).is_file():
        found = _result(path)
    else:
        exported = _read_config(path)
        found = Location("exported folder" if exported else "published weights", path, exported=exported)
    return found if delta is None else replace(found, steps=(*found.steps, Step(delta)))


def existing(name: Path | str) -> Path:
    """Path of an existing file or folder; ``builtin:NAME`` names a policy file that ships with the package."""
    text = str(name)
    if text.startswith("builtin:"):
        folder = Path(str(resources.files("geoalign"))) / "_assets"
        path = folder / f"{text.removeprefix('builtin:')}.safetensors"
        if not path.exists():
            shipped = ", ".join(sorted(f"builtin:{file.stem}" for file in folder.glob("*.safetensors")))
            raise CheckpointError(f"{text}: no such built-in policy (there are: {shipped or 'none'})")
        return path
    path = Path(name)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such model file or folder; `geoalign train` makes run folders, and docs/real-weights.md says "
            "where published weights come from"
        )
    return path


def _result(run: Path) -> Location:
    """The trained policy of a finished run."""
    if (run / POLICY_FILE).is_file():
        return Location("trained policy of a run", run / POLICY_FILE)
    if (run / DELTA_FILE).is_file():
        return _on_its_base(run, run / DELTA_FILE, "trained policy of a run")
    raise CheckpointError(
        f"{run}: a run folder without a trained policy; let the run end (geoalign train --resume auto), or give one of "
        f"its checkpoints ({run / 'checkpoints' / 'step_NNNNNN'})"
    )


def _on_its_base(run: Path, trained: Path, what: str) -> Location:
    """Trained weights on the base that the settings of their run name."""
    settings = run / RUN_CONFIG
    try:
        raw = read_yaml(settings, CheckpointError)
        base, delta, pattern = raw["train"]["base"], raw["train"].get("delta"), compiles(raw["optim"]["trainable"])
        model = raw.get("model", {})
        if not (isinstance(base, str) and isinstance(delta, str | None) and isinstance(model, Mapping)):
            raise TypeError("train.base and train.delta must be names, and model a section")
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{trained}: needs the settings of its run, which name the base it was trained on, but {settings} cannot "
            f"be read ({error})"
        ) from error
    if not str(base).startswith("builtin:") and not Path(base).exists():
        raise CheckpointError(
            f"{trained}: was trained on {base}, which is not there; a relative train.base in {settings} counts from "
            "the folder where the run was started"
        )
    below = locate(base, None if delta is None else Path(delta))
    return replace(below, what=what, steps=(*below.steps, Step(trained, pattern)), trained_as=model)


def vae_of(home: Path) -> Path:
    """The video autoencoder of a model folder: a folder ``vae``, or ``Wan2.1_VAE.pth``.

    Raises:
        CheckpointError: there is neither.
    """
    if home.is_file():
        raise CheckpointError(
            f"{home}: its autoencoder is the Wan VAE, which no policy file holds; run geoalign export --format "
            "diffusers and put the folder vae or Wan2.1_VAE.pth into the result"
        )
    for path in (home / "vae", home / "Wan2.1_VAE.pth"):
        if path.exists():
            return path
    raise CheckpointError(f"{home}: no autoencoder; a folder vae or a file Wan2.1_VAE.pth is needed beside the weights")


def _read_config(folder: Path) -> ModelConfig | None:
    """The model settings of an exported folder, or None if the folder was not written by geoalign.

    Raises:
        CheckpointError: an unreadable or invalid ``config.json``.
    """
    for path in (folder / CONFIG_FILE, folder / "transformer" / CONFIG_FILE):
        if not path.is_file():
            continue
        try:
            settings = read_json_object(path, CheckpointError)
            if "retake" in settings:
                return ModelConfig.model_validate(settings["retake"])
        except ValidationError as error:
            raise CheckpointError(f"{path}: not a readable model configuration ({first_problem(error)})") from None
    return None


def weights_folder(folder: Path) -> Path:
    """Where the transformer's weights lie in a model folder."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder
