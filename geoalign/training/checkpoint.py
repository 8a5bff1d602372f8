"""Checkpoints: complete folders that appear by one rename, safetensors only, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from geoalign.config.training import TrainConfig
from geoalign.errors import CheckpointError, RunError
from geoalign.io_utils import atomic_write_json
from geoalign.policy.files import (
    AVERAGE_FILE,
    CHECKPOINT_NAME,
    STATE_FILE,
    check_part,
    checkpoint_state,
    read_checkpoint_state,
)
from geoalign.sealed import save_sealed
from geoalign.training.engines.snapshot import Snapshot
from geoalign.weights import TensorFile

_PARTS = ("trained.safetensors", AVERAGE_FILE, "optimizer.safetensors")
_OPERATION = ("checkpoint_every", "keep_checkpoints", "async_checkpoints", "rank_timeout_s")


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a resumed run needs besides the configuration; random draws are counter-based and need no state.

    Attributes:
        iteration: iterations already done.
        snapshot: trained parameters, their moving average and the optimizer's state by parameter name, on the CPU.
        notes: JSON values carried along (evaluation before training, seconds used so far).
    """

    iteration: int
    snapshot: Snapshot
    notes: Mapping[str, Any]


def config_hash(resolved: Mapping[str, Any]) -> str:
    """Short hash of the parts of a resolved configuration that change the numbers of a run beyond rounding.

    Ranks and engines may change between the parts of a run (checkpoints hold whole tensors), and so may how often and
    how it saves, waits and scores.
    """
    kept = {key: value for key, value in resolved.items() if key not in ("run", "eval", "parallel", "scoring")}
    kept["run"] = [resolved["run"][key] for key in ("seed", "dtype")]
    kept["train"] = {key: value for key, value in resolved["train"].items() if key not in _OPERATION}
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
        saved, seals = state.snapshot, dict[str, str]()
        flat = {f"{name}/{key}": value for name, entry in saved.optimizer.items() for key, value in entry.items()}
        for part, tensors in zip(_PARTS, (saved.values, saved.average, flat), strict=True):
            path = temporary / part
            seals[part] = save_sealed({name: value.contiguous() for name, value in tensors.items()}, path)
            _flush(path)
        atomic_write_json(temporary / STATE_FILE, checkpoint_state(state.iteration, config, state.notes, seals))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError, RunError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; free disk space, then --resume auto"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power loss must not leave a torn checkpoint."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes the checkpoints of a run, beside the next iteration if ``train.async_checkpoints`` is on.

    A state is a copy on the CPU, so training may go on while it is written. At most one is being written; a failure is
    raised by the next :meth:`save`, or on leaving the block, which waits for the last one.

    Args:
        folder: the run's checkpoint folder.
        config: hash of the configuration.
        settings: how many to keep, and whether to wait.
    """

    def __init__(self, folder: Path, config: str, settings: TrainConfig) -> None:
        self._folder, self._config, self._settings = folder, config, settings
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, state: TrainState) -> None:
        """Write ``state``; raises CheckpointError if this or the one before could not be written."""
        self.wait()
        write = partial(save_checkpoint, self._folder, state, config=self._config, keep=self._settings.keep_checkpoints)
        self._pending = self._pool.submit(write)
        if not self._settings.async_checkpoints:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint in hand and raise its failure."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; half-written ones have another name and are never listed."""
    found = [
        path for path in folder.glob("step_*") if CHECKPOINT_NAME.search(path.name) and (path / STATE_FILE).exists()
    ]
    return sorted(found)


def load_checkpoint(path: Path, *, config: str, allow_config_change: bool = False) -> TrainState:
    """Read a checkpoint.

    Raises:
        CheckpointError: missing, truncated, of another format, or written with another configuration.
    """
    meta = read_checkpoint_state(path)
    try:
        trained, average, flat = (dict(check_part(meta, TensorFile(path / part)).items()) for part in _PARTS)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); delete it and use an older one") from error
    if meta["config"] != config and not allow_config_change:
        raise CheckpointError(
            f"{path}: written with another configuration ({meta['config']}, now {config}); compare config.yaml in the"
            " run folder, or pass --allow-config-change"
        )
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, _, part = key.rpartition("/")
        optimizer.setdefault(name, {})[part] = value
    return TrainState(meta["iteration"], Snapshot(trained, average, optimizer), meta["notes"])
