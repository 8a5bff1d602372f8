"""Read what a run left in its folder; a run that was stopped early still gives a report of what is there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from geoalign.errors import DataError, UsageError
from geoalign.files.arrays import read_arrays
from geoalign.files.atomic import nan_to_none, read_jsonl
from geoalign.files.checkpoints import CHANGED
from geoalign.files.forms import Form, filled
from geoalign.files.locks import LOCK_NAME, held_by
from geoalign.files.parsing import read_json
from geoalign.files.yaml_text import read_yaml

Array = np.ndarray[Any, np.dtype[Any]]
Read = TypeVar("Read")
Shape = tuple[str, tuple[int | None, ...]]
STAGES = ("before", "after")
FILMS = "films"
"""Folder of the films made while a run trains, ``iteration_NNNNNN.npz`` each."""
STOPPED = "stopped.json"
"""Why a run refused to go on (:class:`Stop`); not there of a run that goes on again."""
_FILM = re.compile(r"iteration_([0-9]{6,9})\.(npz|gif)")
_MAX_CLIPS = 8 << 30  # bytes of an evaluation archive in memory


@dataclass(frozen=True, slots=True)
class EvaluationClips:
    """Held-out samples of one stage (``eval/before.npz`` or ``eval/after.npz``), n samples of F frames.

    Videos are uint8 [n, F, 3, H, W]; camera paths are float [n, F, 4, 4], camera to world, relative to frame 0, metres,
    OpenCV axes. Real data has no true retake: ``truth`` is then None. The source's path, the lens [n, F, 4] and the
    plane [n, 4] (:class:`geoalign.report.film.Ground`) are None in older runs.
    """

    names: tuple[str, ...]
    source: Array
    generated: Array
    truth: Array | None
    target_c2w: Array
    estimated_c2w: Array
    source_c2w: Array | None = None
    intrinsics: Array | None = None
    ground_plane: Array | None = None

    def translation_errors(self) -> Array:
        """Mean distance between estimated and target camera over frames 1.., in metres, [n]."""
        return self.translation_errors_by_frame()[:, 1:].mean(axis=-1)

    def translation_errors_by_frame(self) -> Array:
        """Distance between estimated and target camera in metres, [n, F]."""
        return np.linalg.norm(self.estimated_c2w[..., :3, 3] - self.target_c2w[..., :3, 3], axis=-1)

    def rotation_errors_by_frame(self) -> Array:
        """Angle between estimated and target camera in degrees, [n, F]; from the chord, which is exact at 0."""
        chord = np.linalg.norm(
            self.estimated_c2w[..., :3, :3].astype(np.float64) - self.target_c2w[..., :3, :3], axis=(-2, -1)
        )
        return np.degrees(2 * np.arcsin(np.minimum(chord / math.sqrt(8), 1)))


@dataclass(frozen=True, slots=True)
class TrainingClip:
    """A training sample of one iteration, counted from 0: uint8 [F, 3, H, W] videos, the paths asked for and read.

    ``frames`` are the numbers of the F frames among those of the video, from 1; poses of ``read_c2w`` may be NaN.
    """

    iteration: int
    source: Array
    retake: Array
    target_c2w: Array
    intrinsics: Array
    frames: Array
    ground_plane: Array | None = None
    read_c2w: Array | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """How a run's processes were started, last.

    Attributes:
        count: of them; None of older runs, which did not record it.
        nodes: machines that they ran on.
        torchrun: whether torchrun started them; else the run itself did, of which ``run.ranks`` decides the number.
    """

    count: int | None
    nodes: int = 1
    torchrun: bool = False

    @classmethod
    def parse(cls, entry: Any) -> Started:
        """Read what ``env.json`` keeps; what somebody made something else is not known."""
        found = entry if isinstance(entry, dict) else {}
        count, nodes = found.get("count"), found.get("nodes", 1)
        if not (isinstance(count, int) and isinstance(nodes, int) and 1 <= nodes <= count and count % nodes == 0):
            return cls(None)
        return cls(count, nodes, found.get("torchrun") is True)


class Stop(Form):
    """An iteration that a run refused to finish, and that does not count.

    Attributes:
        iteration: its number, from 0; its row of metrics is not whole.
        reason: what was said.
        repeats: whether the run, started again as it is, would find the same.
    """

    iteration: int
    reason: str
    repeats: bool


@dataclass(frozen=True, slots=True)
class Change:
    """Settings or data that a run went on with otherwise, in words, after that many ``iterations``."""

    iterations: int
    what: str

    @classmethod
    def parse(cls, entries: Any) -> list[Change]:
        """Read what ``env.json`` and ``summary.json`` keep; what somebody made something else is left out."""
        listed = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        pairs = [(entry.get("iteration"), entry.get("what")) for entry in listed]
        return [cls(done, what) for done, what in pairs if isinstance(done, int) and isinstance(what, str)]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything the report shows; ``live``: a process is writing the run."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    clips: dict[str, EvaluationClips] = field(default_factory=dict)
    live: bool = False
    films: list[TrainingClip] = field(default_factory=list)
    stop: Stop | None = None

    @property
    def name(self) -> str:
        """The name given in the configuration, else the folder's name."""
        return str(self.config.get("run", {}).get("name") or self.folder.name)

    @property
    def started(self) -> Started:
        """How its processes were started."""
        return Started.parse(self.environment.get("processes"))

    @property
    def changes(self) -> list[Change]:
        """What changed on the way: ``config`` holds the settings of the last iterations only."""
        return Change.parse(self.environment.get(CHANGED) or self.summary.get(CHANGED))

    @property
    def held_out(self) -> bool:
        """Whether the run is measured on held-out conditions: in the rendered world, which has true retakes."""
        return self.setting("world") is not None

    def setting(self, key: str) -> Any:
        """A value of the resolved configuration by its dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

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
    config, summary = _optional(path / "config.yaml", read_yaml), read_summary(path)
    _mapping(path / "config.yaml", config.get("run", {}), "run")
    return RunRecord(
        folder=path,
        config=config,
        environment=_optional(path / "env.json", read_json),
        summary=summary,
        metrics=_if_there(path / "metrics.jsonl", _read_metrics) or [],
        clips={stage: clips for stage in STAGES if (clips := _if_there(path / "eval" / f"{stage}.npz", _read_clips))},
        live=is_live(path),
        films=read_films(path / FILMS),
        stop=_if_there(path / STOPPED, _read_stop),
    )


def is_live(folder: Path) -> bool:
    """Whether a process is writing the run."""
    return bool(held_by(folder / LOCK_NAME))


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``: whole iterations, and numbers or null."""
    rows: list[dict[str, Any]] = nan_to_none(read_jsonl(path))
    for line, row in enumerate(rows, 1):
        whole = isinstance(row.get("iteration", 0), int) and row.get("iteration", 0) >= 0
        wrong = next((key for key, value in row.items() if not isinstance(value, int | float | None)), None)
        if wrong is not None or not whole:
            key = "iteration" if wrong is None else wrong
            raise DataError(f"{path}: line {line}: {key} is {row[key]!r}, not a number; delete the line.")
    return rows


def _read_stop(path: Path) -> Stop:
    return filled(Stop, read_json(path), path, "delete it")


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a run folder; empty where the run did not end. Raises DataError if it is damaged."""
    file = folder / "summary.json"
    summary: dict[str, Any] = nan_to_none(_optional(file, read_json))
    _check_stages(file, "held_out", summary.get("held_out"), several=False)
    _check_stages(file, "held_out_per_noise_seed", summary.get("held_out_per_noise_seed"), several=True)
    return summary


def _if_there(path: Path, read: Callable[[Path], Read]) -> Read | None:
    """What ``read`` finds in a file; None where there is none.

    Nor is there one that vanishes meanwhile: a run under way thins its films out and sets results aside.
    """
    try:
        return read(path)
    except DataError:
        if path.exists():
            raise
        return None


def _optional(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The mapping in a file; an empty one where there is no file."""
    value = _if_there(path, read)
    return {} if value is None else _mapping(path, value)


def _mapping(path: Path, value: Any, section: str = "the file") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {section} must be a mapping, not {type(value).__name__}; restore or delete the file.")
    return value


def _check_stages(path: Path, key: str, value: Any, *, several: bool, depth: int = 3) -> None:
    """Held-out numbers are mappings by set, stage and metric, with a number, a list of numbers or null in them; of
    ``several`` noise seeds no single number."""
    if depth and value is not None:
        for name, inner in _mapping(path, value, key).items():
            _check_stages(path, f"{key}.{name}", inner, several=several, depth=depth - 1)
    elif not all(entry is None or isinstance(entry, int | float) for entry in _listed(value)) or (
        several and not isinstance(value, list | None)
    ):
        wanted = "a list of numbers" if several else "a number or a list of numbers"
        raise DataError(f"{path}: {key} must be {wanted}; restore or delete the file.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def film_iteration(path: Path) -> int | None:
    """The iteration of ``iteration_NNNNNN.npz`` or ``.gif``, counted from 0; None of a file that no run calls so."""
    named = _FILM.fullmatch(path.name)
    return int(named[1]) if named else None


def read_films(folder: Path, most: int = 6) -> list[TrainingClip]:
    """At most ``most`` films of a run's folder, evenly spaced, in order; without those that vanish meanwhile.

    Raises:
        DataError: one of them cannot be read.
    """
    paths = sorted(path for path in folder.glob("*.npz") if film_iteration(path) is not None)
    chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    read = (_if_there(paths[index], _read_film) for index in chosen)
    return [film for film in read if film is not None]


def _read_film(path: Path) -> TrainingClip:
    arrays = read_arrays(path, DataError, limit=_MAX_CLIPS)
    if not isinstance(arrays, dict):
        raise DataError(f"{path}: not the film of an iteration; delete it.")
    shapes = {key: value for key, value in _FILM_SHAPES.items() if key in arrays or key not in _FILM_OPTIONAL}
    _check_arrays(path, arrays, shapes, "the film of an iteration", "delete it")
    if len({len(arrays[name]) for name in shapes if name != "ground_plane"}) > 1:
        raise DataError(f"{path}: its arrays hold unequal numbers of frames; delete it.")
    return TrainingClip(film_iteration(path) or 0, **{name: arrays[name] for name in shapes})


_SHAPES: dict[str, Shape] = {
    "names": ("U", (None,)),
    "source": ("u", (None, None, 3, None, None)),
    "generated": ("u", (None, None, 3, None, None)),
    "target_c2w": ("f", (None, None, 4, 4)),
    "estimated_c2w": ("f", (None, None, 4, 4)),
}
"""Kind and shape of the arrays of an evaluation archive; None fits any length above 0."""
_OPTIONAL: dict[str, Shape] = {
    "truth": _SHAPES["generated"],
    "source_c2w": _SHAPES["target_c2w"],
    "intrinsics": ("f", (None, None, 4)),
    "ground_plane": ("f", (None, 4)),
}
_FILM_SHAPES: dict[str, Shape] = {
    "source": ("u", (None, 3, None, None)),
    "retake": ("u", (None, 3, None, None)),
    "target_c2w": ("f", (None, 4, 4)),
    "intrinsics": ("f", (None, 4)),
    "frames": ("i", (None,)),
    "ground_plane": ("f", (4,)),
    "read_c2w": ("f", (None, 4, 4)),
}
_FILM_OPTIONAL = ("ground_plane", "read_c2w")
_WITHOUT_FRAMES = ("names", "ground_plane")


def _read_clips(path: Path) -> EvaluationClips:
    arrays = read_arrays(path, DataError, limit=_MAX_CLIPS)
    if not isinstance(arrays, dict):
        raise DataError(f"{path}: not an evaluation archive; run `geoalign evaluate` again.")
    shapes = _SHAPES | {name: shape for name, shape in _OPTIONAL.items() if name in arrays}
    _check_arrays(path, arrays, shapes, "a readable evaluation archive", "run `geoalign evaluate` again")
    frames = {arrays[name].shape[1] for name in shapes if name not in _WITHOUT_FRAMES}
    if len({len(arrays[name]) for name in shapes}) > 1 or len(frames) > 1:
        raise DataError(f"{path}: its arrays hold unequal numbers of samples or frames; run `geoalign evaluate` again.")
    return EvaluationClips(
        names=tuple(str(name) for name in arrays["names"]),
        source=arrays["source"],
        generated=arrays["generated"],
        target_c2w=arrays["target_c2w"],
        estimated_c2w=arrays["estimated_c2w"],
        **{name: arrays.get(name) for name in _OPTIONAL},
    )


def _check_arrays(path: Path, arrays: Mapping[str, Array], shapes: Mapping[str, Shape], what: str, fix: str) -> None:
    """Raise DataError unless every array is there with its kind and shape."""
    for name, (kind, wanted) in shapes.items():
        found = arrays.get(name)
        if found is None or found.dtype.kind != kind or not _fits(found.shape, wanted):
            got = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise DataError(f"{path}: not {what} ({name}: {got}); {fix}.")


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(s == w or (w is None and s) for s, w in zip(shape, wanted, strict=True))
