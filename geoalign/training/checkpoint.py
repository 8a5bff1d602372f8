"""Checkpoints: complete folders that appear by one rename, safetensors only, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from geoalign.config.load import differing_keys, flatten
from geoalign.config.training import TrainConfig
from geoalign.errors import CheckpointError, ConfigError, RunError
from geoalign.files.atomic import atomic_folder, remove_folder
from geoalign.files.checkpoints import CHANGED, list_checkpoints
from geoalign.files.sealed import save_sealed
from geoalign.files.weights import TensorFile
from geoalign.policy.files import (
    AVERAGE_FILE,
    STATE_FILE,
    check_part,
    checkpoint_state,
    read_checkpoint_state,
)
from geoalign.training.engines.snapshot import Snapshot

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

    def changed(self, what: str) -> TrainState:
        """The same with a note that the run goes on otherwise from here, as ``what`` says."""
        entry = {"iteration": self.iteration, "what": what}
        return replace(self, notes={**self.notes, CHANGED: [*self.notes.get(CHANGED, ()), entry]})


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The parts of a resolved configuration that change the numbers of a run beyond rounding.

    Ranks and engines may change between the parts of a run (checkpoints hold whole tensors), and so may how often and
    how it saves, waits and scores.

    Attributes:
        hash: short hash of them.
        values: the same by dotted key, to name what differs.
    """

    hash: str
    values: Mapping[str, Any]

    @staticmethod
    def of(resolved: Mapping[str, Any]) -> RunSettings:
        """Those of a configuration as JSON values."""
        kept = {key: value for key, value in resolved.items() if key not in ("run", "eval", "parallel", "scoring")}
        kept["train"] = {key: value for key, value in resolved["train"].items() if key not in _OPERATION}
        run = {key: resolved["run"][key] for key in ("seed", "dtype")}
        text = json.dumps(kept | {"run": list(run.values())}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return RunSettings(digest, flatten(json.loads(json.dumps(kept | {"run": run}, default=str))))


def config_hash(resolved: Mapping[str, Any]) -> str:
    """:attr:`RunSettings.hash` of a resolved configuration."""
    return RunSettings.of(resolved).hash


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``key old -> new`` of every key that differs, in one line."""
    keys = differing_keys(before, now)
    sides = ((json.dumps(side[key]) if key in side else "(absent)" for side in (before, now)) for key in keys)
    return ", ".join(f"{key} {' -> '.join(pair)}" for key, pair in zip(keys, sides, strict=True))


def save_checkpoint(folder: Path, state: TrainState, *, config: RunSettings, keep: int) -> Path:
    """Write ``folder/step_NNNNNN`` atomically and delete all but the newest ``keep`` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        state: what to save.
        config: settings of the run.
        keep: checkpoints to keep; the one just written is always kept.

    Raises:
        CheckpointError: the disk refused (full, read-only); earlier checkpoints are untouched.
    """
    final = folder / f"step_{state.iteration:06d}"
    saved = state.snapshot
    flat = {f"{name}/{key}": value for name, entry in saved.optimizer.items() for key, value in entry.items()}
    try:
        with atomic_folder(final, "free disk space, then --resume auto") as temporary:
            seals = {}
            for part, tensors in zip(_PARTS, (saved.values, saved.average, flat), strict=True):
                whole = {name: value.contiguous() for name, value in tensors.items()}
                seals[part] = save_sealed(whole, temporary / part)
            meta = checkpoint_state(state.iteration, config.hash, config.values, state.notes, seals)
            (temporary / STATE_FILE).write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except RunError as error:
        raise CheckpointError(f"checkpoint {error}") from error
    for old in [path for path in list_checkpoints(folder) if path != final][: -(keep - 1) or None]:
        with contextlib.suppress(OSError):  # what cannot be deleted stays, and is tried again after the next one
            remove_folder(old)
    return final


class CheckpointWriter:
    """Writes the checkpoints of a run, beside the next iteration if ``train.async_checkpoints`` is on.

    A state is a copy on the CPU, so training may go on while it is written. At most one is being written; a failure is
    raised by the next :meth:`save`, or on leaving the block, which waits for the last one.

    Args:
        folder: the run's checkpoint folder.
        config: settings of the run.
        settings: how many to keep, and whether to wait.
    """

    def __init__(self, folder: Path, config: RunSettings, settings: TrainConfig) -> None:
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


def load_checkpoint(path: Path, *, config: RunSettings, allow_config_change: bool = False) -> TrainState:
    """Read a checkpoint; other settings that are allowed go into its notes.

    Raises:
        CheckpointError: missing, truncated or of another format.
        ConfigError: written with other settings; the message names their keys.
    """
    meta = read_checkpoint_state(path)
    try:
        trained, average, flat = (dict(check_part(meta, TensorFile(path / part)).items()) for part in _PARTS)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); delete it and use an older one") from error
    found, changed = meta["config"], ""
    if found != config.hash:
        changed = differences(meta.get("settings", config.values), config.values) or f"{found}, now {config.hash}"
    if changed and not allow_config_change:
        raise ConfigError(
            f"{path}: written with another configuration ({changed}); restore it, or pass --allow-config-change"
        )
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, _, part = key.rpartition("/")
        optimizer.setdefault(name, {})[part] = value
    state = TrainState(meta["iteration"], Snapshot(trained, average, optimizer), meta["notes"])
    return state.changed(changed) if changed else state
