"""Read what a run left in its folder; a run that was stopped early still gives a report of what is there."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from geoalign.errors import DataError, UsageError
from geoalign.io_utils import read_jsonl

Array = np.ndarray[Any, np.dtype[Any]]
STAGES = ("before", "after")


@dataclass(frozen=True, slots=True)
class EvaluationClips:
    """Held-out samples of one stage (``eval/before.npz`` or ``eval/after.npz``), n samples of F frames.

    Videos are uint8 [n, F, 3, H, W]; camera paths are float [n, F, 4, 4], camera to world, relative to frame 0, metres,
    OpenCV axes. Real data has no true retake: ``truth`` is then None.
    """

    names: tuple[str, ...]
    source: Array
    generated: Array
    truth: Array | None
    target_c2w: Array
    estimated_c2w: Array

    def translation_errors(self) -> Array:
        """Mean distance between estimated and target camera over frames 1.., in metres, [n]."""
        offset = self.estimated_c2w[:, 1:, :3, 3] - self.target_c2w[:, 1:, :3, 3]
        return np.linalg.norm(offset, axis=-1).mean(axis=-1)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything the report shows."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    clips: dict[str, EvaluationClips] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name given in the configuration, else the folder's name."""
        return str(self.config.get("run", {}).get("name") or self.folder.name)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return iterations and values of one metric, leaving out rows without a finite value of it."""
        steps, values = [], []
        for index, row in enumerate(self.metrics):
            value = row.get(key)
            if isinstance(value, int | float) and np.isfinite(value):
                steps.append(float(row.get("iteration", index)))
                values.append(float(value))
        return steps, values

    def metric_keys(self, prefix: str) -> list[str]:
        """List the keys that start with ``prefix`` in order of first appearance."""
        return [key for key in dict.fromkeys(key for row in self.metrics for key in row) if key.startswith(prefix)]


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UsageError: no such folder, or nothing of a run in it.
        DataError: a file is there but cannot be read; the message names it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"no run folder at {path}; give the folder that `geoalign train` printed, such as runs/NAME.")
    if not any((path / name).is_file() for name in ("metrics.jsonl", "summary.json", "config.yaml")):
        raise UsageError(f"{path} is not a run folder: it has no metrics.jsonl, summary.json or config.yaml.")
    config = _read_yaml(path / "config.yaml")
    _mapping(path / "config.yaml", config.get("run", {}), "run")
    return RunRecord(
        folder=path,
        config=config,
        environment=_read_json(path / "env.json"),
        summary=_read_json(path / "summary.json"),
        metrics=_read_jsonl(path / "metrics.jsonl"),
        clips={stage: clips for stage in STAGES if (clips := _read_clips(path / "eval" / f"{stage}.npz"))},
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); delete or restore the file.") from None
    return _mapping(path, value)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML ({error}); delete or restore the file.") from None
    return _mapping(path, value)


def _mapping(path: Path, value: Any, section: str = "the file") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {section} must be a mapping, not {type(value).__name__}; restore or delete the file.")
    return value


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [_mapping(path, row) for row in read_jsonl(path)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text ({error}); restore the file or delete it.") from None


def _read_clips(path: Path) -> EvaluationClips | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        return EvaluationClips(
            names=tuple(str(name) for name in arrays["names"]),
            source=arrays["source"],
            generated=arrays["generated"],
            truth=arrays.get("truth"),
            target_c2w=arrays["target_c2w"],
            estimated_c2w=arrays["estimated_c2w"],
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: not a readable evaluation archive ({error}); run `geoalign evaluate` again."
        ) from None
    except Exception as error:  # numpy lets zipfile's own errors through (BadZipFile derives from Exception only)
        raise DataError(f"{path}: damaged archive ({error}); run `geoalign evaluate` again.") from None
