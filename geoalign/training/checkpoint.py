"""Checkpoints: complete folders that appear by one rename, safetensors only, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geoalign.errors import CheckpointError
from geoalign.io_utils import atomic_write_json

_NAME = re.compile(r"step_(\d{6})$")
FORMAT = 1


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a resumed run needs besides the configuration; random draws are counter-based and need no state.

    Attributes:
        iteration: iterations already done.
        trained: trained parameters by name.
        average: their moving average by name, or the parameters themselves.
        optimizer: AdamW state by parameter name: ``exp_avg``, ``exp_avg_sq``, ``step``.
        notes: JSON values carried along (evaluation before training, seconds used so far).
    """

    iteration: int
    trained: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    notes: Mapping[str, Any]


def config_hash(resolved: Mapping[str, Any]) -> str:
    """Short hash of the parts of a resolved configuration that change the numbers of a run."""
    kept = {key: value for key, value in resolved.items() if key not in ("run", "eval")}
    kept["seed"] = resolved["run"]["seed"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_checkpoint(folder: Path, state: TrainState, *, config: str, keep: int) -> Path:
    """Write ``folder/step_NNNNNN`` atomically and delete all but the newest ``keep`` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        state: what to save.
        config: hash of the configuration (:func:`config_hash`).
        keep: checkpoints to keep.

    Raises:
        CheckpointError: the disk refused (full, read-only); earlier checkpoints are untouched.
    """
    final = folder / f"step_{state.iteration:06d}"
    temporary = folder / f".writing_{final.name}_{os.getpid()}"
    for left_over in folder.glob(".writing_*"):  # of a process that was killed while it wrote
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_contiguous(state.trained), temporary / "trained.safetensors")
        save_file(_contiguous(state.average), temporary / "average.safetensors")
        flat = {f"{name}/{key}": value for name, entry in state.optimizer.items() for key, value in entry.items()}
        save_file(_contiguous(flat), temporary / "optimizer.safetensors")
        meta = {"format": FORMAT, "iteration": state.iteration, "config": config, "notes": dict(state.notes)}
        atomic_write_json(temporary / "state.json", meta)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; free disk space, then --resume auto"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; half-written ones have another name and are never listed."""
    found = [path for path in folder.glob("step_*") if _NAME.search(path.name) and (path / "state.json").exists()]
    return sorted(found)


def load_checkpoint(path: Path, *, config: str, allow_config_change: bool = False) -> TrainState:
    """Read a checkpoint.

    Raises:
        CheckpointError: missing, truncated, of another format, or written with another configuration.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        trained, average, flat = (
            load_file(path / f"{part}.safetensors") for part in ("trained", "average", "optimizer")
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}); delete it and resume from an older one"
        ) from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {meta.get('format')!r}, this version reads {FORMAT}")
    if meta["config"] != config and not allow_config_change:
        raise CheckpointError(
            f"{path}: written with another configuration ({meta['config']}, now {config}); compare config.yaml in the"
            " run folder, or pass --allow-config-change"
        )
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, _, part = key.rpartition("/")
        optimizer.setdefault(name, {})[part] = value
    return TrainState(meta["iteration"], trained, average, optimizer, meta["notes"])


def optimizer_state(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter name (empty before the first update)."""
    return {name: dict(optimizer.state[p]) for name, p in trained.items() if p in optimizer.state}


def restore(
    state: TrainState,
    trained: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Copy a checkpoint into parameters, moving average and optimizer.

    Raises:
        CheckpointError: names or shapes differ, either way.
    """
    copy_strictly(state.trained, trained, "checkpoint")
    if average:
        copy_strictly(state.average, average, "moving average of the checkpoint")
    for name, entry in state.optimizer.items():
        optimizer.state[trained[name]] = {key: value.clone() for key, value in entry.items()}


@torch.no_grad()
def copy_strictly(values: Mapping[str, Tensor], into: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name; both name sets and all shapes must agree.

    Raises:
        CheckpointError: lists the first missing, unexpected or wrongly shaped names.
    """
    missing, unexpected = sorted(set(into) - set(values)), sorted(set(values) - set(into))
    shapes = [name for name in into if name in values and into[name].shape != values[name].shape]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        listed = "; ".join(f"{label}: {', '.join(names[:3])} ({len(names)} in all)" for label, names in parts if names)
        raise CheckpointError(f"{what} does not fit this model: {listed}")
    for name, target in into.items():
        target.copy_(values[name])


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
