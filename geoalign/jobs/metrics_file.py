"""Metrics of a run: one JSON object per iteration, the same numbers to TensorBoard."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from geoalign.config.training import RunConfig
from geoalign.errors import ConfigError, DataError
from geoalign.files.atomic import append_text, atomic_write_text, disk_errors, nan_to_none, read_jsonl
from geoalign.install import install

_FIX = "free disk space or bring the folder back, then --resume auto"


class MetricsWriter:
    """Appends to ``metrics.jsonl``, to TensorBoard event files under ``tb/`` and, if asked for, to Weights & Biases.

    A resumed run drops rows at or after its first iteration, so a row is never there twice.

    Raises:
        ConfigError: ``run.wandb`` is set and the package is missing.
        DataError: the rows of an earlier part of the run cannot be read.
    """

    def __init__(self, folder: Path, run: RunConfig, first_iteration: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self._events = folder / "metrics.jsonl", folder / "tb"
        if self.path.exists():
            kept = [row for row in read_jsonl(self.path) if self._iteration(row) < first_iteration]
            atomic_write_text(self.path, "".join(_line(row) for row in kept))
        with disk_errors(self._events, _FIX):
            self._board = SummaryWriter(str(self._events), purge_step=first_iteration)
        self._hook, threading.excepthook = threading.excepthook, self._of_a_thread
        self._tracker = None if run.wandb is None else _tracker(folder, run)

    def _iteration(self, row: Mapping[str, Any]) -> int:
        number = row.get("iteration")
        if not isinstance(number, int):
            raise DataError(f"{self.path}: a row has no iteration number ({number!r}); delete that line")
        return number

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record one iteration; a non-finite number becomes null in JSON.

        Raises RunError when the disk refuses; the file then has no part of the line.
        """
        with disk_errors(self.path, _FIX):
            append_text(self.path, _line({"iteration": iteration, **values}))
        with disk_errors(self._events, _FIX):
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)
            self._board.flush()
        if self._tracker is not None:
            self._tracker.log(dict(values), step=iteration)

    def add_films(self, films: Iterable[tuple[int, Path]]) -> None:
        """Show GIFs, by iteration, among TensorBoard's images, and give the files to Weights & Biases."""
        from tensorboard.compat.proto import summary_pb2

        proto: Any = summary_pb2  # generated when it is imported: its messages are known to no type checker
        board: Any = self._board._get_file_writer()
        for iteration, path in films:
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # thinned out, by the thread that writes films
                continue
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
            image = proto.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            shown = proto.Summary(value=[proto.Summary.Value(tag="film", image=image)])
            with disk_errors(self._events, _FIX):
                board.add_summary(shown, iteration)
                board.flush()
            if self._tracker is not None:
                self._tracker.save(str(path), base_path=str(path.parents[1]), policy="now")

    def _of_a_thread(self, error: threading.ExceptHookArgs) -> None:
        """Say nothing of a full disk in TensorBoard's thread: its next call raises it, where it becomes one line."""
        if type(error.thread).__module__.partition(".")[0] != "tensorboard":
            self._hook(error)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self._events, _FIX) if error is None else suppress(OSError):
                self._board.close()
        finally:
            threading.excepthook = self._hook
        if self._tracker is not None:
            self._tracker.finish(exit_code=int(error is not None))


def _tracker(folder: Path, run: RunConfig) -> Any:
    """A W&B run that a resumed run continues; WANDB_MODE=offline keeps it in the run folder."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"run.wandb={run.wandb} needs the package: {install('wandb')} ({error})") from error
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return wandb.init(project=run.wandb, name=run.name, dir=str(folder), id=identity, resume="allow")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(nan_to_none(row)) + "\n"
