"""Metrics of a run: one JSON object per iteration, the same numbers to TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from geoalign.io_utils import atomic_write_text, read_jsonl


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard event files under ``tb/``.

    A resumed run drops rows at or after its first iteration, so a row is never there twice.
    """

    def __init__(self, folder: Path, first_iteration: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [row for row in read_jsonl(self.path) if row["iteration"] < first_iteration]
            atomic_write_text(self.path, "".join(_line(row) for row in kept))
        self._board = SummaryWriter(str(folder / "tb"), purge_step=first_iteration)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record one iteration; a non-finite number becomes null in JSON."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"iteration": iteration, **values}))
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        self._board.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
