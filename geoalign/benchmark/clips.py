"""The source clips of a benchmark: a folder of clips, or held-out scenes of the embedded world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from typing import Protocol

from torch import Tensor

from geoalign.benchmark.cases import Condition, plain
from geoalign.benchmark.slices import dynamic_share, near_foreground
from geoalign.config.data import ClipsConfig
from geoalign.config.schema import Config
from geoalign.config.world import WorldConfig
from geoalign.data.clip_record import ClipRecord
from geoalign.data.clips import list_clips, natural_key, read_clip_list
from geoalign.data.readers import AnyReader
from geoalign.data.tally import Tally
from geoalign.data.video import PyAVReader, VideoInfo, probe_clip
from geoalign.errors import ConfigError, DataError, UsageError
from geoalign.evaluators.flow_pnp import plane_depth
from geoalign.files.digest import content_hash, text_hash
from geoalign.geometry.cameras.door import (
    camera_file_beside,
    files_of,
    is_preset,
    open_camera,
    open_target,
    split_name,
)
from geoalign.geometry.presets import PRESETS
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory
from geoalign.jobs.sample import find_source_camera, read_source
from geoalign.policy.published import FOLDER_FPS
from geoalign.types import SourceClip
from geoalign.world.motion import PRESETS as WORLD_PRESETS
from geoalign.world.pairs import PROMPT, HeldOutScene

_WORLD = "world/"
"""Begins the name of an embedded world's path in a condition, so that none is taken for a published one."""
OF_CLIP = "{clip}"
"""In a path of ``benchmark.paths``: the clip's name, of a name with folders the first."""
_WORLD_CLIPS, _WORLD_SEED = 10, 2
"""Scenes by default; offset of their seed, beside those of the two sets that ``evaluate`` shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One source, decoded.

    Attributes:
        clip: a batch of one at the benchmark's size.
        fps: frames per second of the retake.
        caption: what the clip list says that it shows, "" if nothing.
        told: where its camera comes from, in words.
    """

    clip: SourceClip
    fps: float
    caption: str
    told: str


class Clips(Protocol):
    """Clips by plain name, in the order in which they are worked on."""

    names: tuple[str, ...]
    knows_truth: bool
    """Whether :meth:`truth` gives the true retakes."""
    cuts: bool
    """Whether :meth:`source` gives fewer frames than the clip has; else all clips have equally many."""
    lossless: bool
    """Whether retakes are written without loss (tiny frames) or as the published script writes them."""

    def paths_of(self, name: str) -> tuple[str, ...]:
        """The paths that are asked for of a clip."""
        ...

    def contents(self) -> dict[str, str]:
        """What clips, their cameras and paths hold, by name: a benchmark is not taken up with others."""
        ...

    def caption(self, name: str) -> str:
        """What the clip list says that a clip shows, "" if nothing."""
        ...

    def native_frames(self, name: str) -> int:
        """How many frames the clip has."""
        ...

    def size_of(self, name: str) -> tuple[int, int]:
        """Height and width of its retakes."""
        ...

    def source(self, name: str, frames: int) -> Source:
        """Its first ``frames`` frames; raises DataError if they cannot be read."""
        ...

    def target(self, condition: Condition, source: SourceClip) -> CameraTrajectory:
        """The wanted path ``[1, F]``, with the lens of the source."""
        ...

    def truth(self, condition: Condition, target: CameraTrajectory) -> Tensor | None:
        """The true retake ``[1, F, 3, H, W]``, or None where nobody knows it."""
        ...

    def dynamic_share(self, name: str, frames: int) -> float | None:
        """Share of the pixels that annotations call moving, or None without annotations."""
        ...


def open_clips(config: Config) -> Clips:
    """The clips that ``benchmark`` of the configuration names.

    Raises:
        ConfigError: neither clips nor an embedded world.
        DataError: there are none, or the list names one that is not there.
        UsageError: an unknown path.
    """
    if config.benchmark.clips is not None:
        return FolderClips(config)
    if config.world is None:
        raise ConfigError("benchmark.clips is not set: name a folder of clips (DAVIS: the folder of JPEGImages)")
    return WorldClips(config, config.world)


class WorldClips:
    """Held-out scenes of the embedded world, each with the true retake of any of its ten paths."""

    knows_truth = lossless = True
    cuts = False

    def __init__(self, config: Config, world: WorldConfig) -> None:
        settings, self._seed = config.benchmark, config.eval.seed + _WORLD_SEED
        self._world, self._fps = world, world.fps
        self.names = tuple(f"scene{number:02d}" for number in range(settings.max_clips or _WORLD_CLIPS))
        wanted = settings.paths or WORLD_PRESETS
        if unknown := [path for path in wanted if path not in WORLD_PRESETS]:
            raise UsageError(
                f"benchmark.paths: the embedded world flies {', '.join(WORLD_PRESETS)}, not {unknown[0]!r}"
            )
        self._paths = tuple(_WORLD + path for path in wanted)
        self._scene = lru_cache(maxsize=1)(lambda name: HeldOutScene.draw(world, self._seed, name))

    def paths_of(self, name: str) -> tuple[str, ...]:
        """See :class:`Clips`."""
        return self._paths

    def contents(self) -> dict[str, str]:
        """See :class:`Clips`: nothing that its settings do not say."""
        return {}

    def caption(self, name: str) -> str:
        """See :class:`Clips`."""
        return PROMPT

    def native_frames(self, name: str) -> int:
        """See :class:`Clips`."""
        return self._world.frames

    def size_of(self, name: str) -> tuple[int, int]:
        """See :class:`Clips`."""
        return self._world.height, self._world.width

    def source(self, name: str, frames: int) -> Source:
        """See :class:`Clips`."""
        if frames != self._world.frames:
            raise DataError(f"clips of this world have {self._world.frames} frames, not {frames}")
        return Source(self._scene(name).source(), self._fps, self.caption(name), "the world's own camera")

    def target(self, condition: Condition, source: SourceClip) -> CameraTrajectory:
        """See :class:`Clips`."""
        return self._scene(condition.clip).target(condition.path.removeprefix(_WORLD), condition.speed)

    def truth(self, condition: Condition, target: CameraTrajectory) -> Tensor | None:
        """See :class:`Clips`."""
        return self._scene(condition.clip).truth(target)

    def dynamic_share(self, name: str, frames: int) -> float | None:
        """See :class:`Clips`: nothing moves in this world but the camera."""
        return 0.0


class FolderClips:
    """The clips of a folder in any layout that ``geoalign data check`` lists."""

    knows_truth = lossless = False
    cuts = True

    def __init__(self, config: Config) -> None:
        settings = config.benchmark
        assert settings.clips is not None
        self._root, self._size, self._published = settings.clips, settings.size, settings.settings == "published"
        records = list_clips(self._root, ClipsConfig(), Tally("clips"))
        self._records = _by_plain_name(self._root, records)
        names = list(self._records) if settings.clip_list is None else _listed(settings.clip_list, self._records)
        self.names = tuple(names[: settings.max_clips])
        self._paths = settings.paths or PRESETS
        for path in self._paths:
            if OF_CLIP not in path:
                _check_path(path)

    def paths_of(self, name: str) -> tuple[str, ...]:
        """See :class:`Clips`; raises DataError where a pattern finds no file of this clip."""
        called = Path(self._records[name].clip_id).parts[0]
        return tuple(path for asked in self._paths for path in _files_of(asked, called))

    def contents(self) -> dict[str, str]:
        """See :class:`Clips`: by what lies in their files."""
        paths = {path for name in self.names for path in self.paths_of(name) if not is_preset(path)}
        files = {str(file): file for path in paths for file in files_of(split_name(path)[0])}
        files |= {name: self._records[name].path for name in self.names}
        found = {name: _content(file) for name, file in sorted(files.items())}
        cameras = {name: camera for name in self.names if (camera := self._camera(name)) is not None}
        return found | {f"camera of {name}": _camera_content(camera) for name, camera in cameras.items()}

    def caption(self, name: str) -> str:
        """See :class:`Clips`."""
        return self._records[name].caption

    def _camera(self, name: str) -> Path | None:
        """The camera file of a clip: that of the clip list, else the one beside it."""
        record = self._records[name]
        beside = camera_file_beside(record.path)
        return record.camera or (beside if beside.is_file() else None)

    def native_frames(self, name: str) -> int:
        """See :class:`Clips`."""
        return self._info(name).frames

    def size_of(self, name: str) -> tuple[int, int]:
        """See :class:`Clips`."""
        info = self._info(name)
        return self._size or (info.height, info.width)

    def source(self, name: str, frames: int) -> Source:
        """See :class:`Clips`."""
        record = self._record(name)
        camera, told = (str(record.camera), f"{record.camera}") if record.camera else find_source_camera(record.path)
        clip, fps = read_source(record.path, frames, self.size_of(name), source_camera=camera)
        fps = FOLDER_FPS if self._published and record.path.is_dir() else fps
        return Source(replace(clip, clip_ids=(name,)), fps, self.caption(name), told or "a camera that does not move")

    def target(self, condition: Condition, source: SourceClip) -> CameraTrajectory:
        """See :class:`Clips`."""
        lens = source.camera.intrinsics[0, 0]
        path = open_target(condition.path, source.video.shape[1], speed=condition.speed, intrinsics=lens)
        return CameraTrajectory.stack([path])

    def truth(self, condition: Condition, target: CameraTrajectory) -> Tensor | None:
        """See :class:`Clips`."""
        return None

    def dynamic_share(self, name: str, frames: int) -> float | None:
        """See :class:`Clips`: the share of annotated pixels of a DAVIS clip, over its first ``frames`` frames."""
        return dynamic_share(self._record(name).path, frames, self.size_of(name))

    def _info(self, name: str) -> VideoInfo:
        return probe_clip(AnyReader(PyAVReader()), self._record(name).path)

    def _record(self, name: str) -> ClipRecord:
        record = self._records[name]
        if record.start_frame or record.end_frame is not None:
            raise DataError(
                f"{record.path}: the benchmark takes whole files, and the clip list cuts this one; cut the file"
            )
        return record


def near_share(source: SourceClip, depth: Callable[[Tensor], Tensor | None] | None) -> float | None:
    """Share of the source's pixels that are near foreground: by its ground plane (frame 0), else by ``depth`` of its
    video ``[F, 3, H, W]``; None where nobody knows."""
    if source.ground_plane is not None:
        return near_foreground(plane_depth(source, *source.video.shape[-2:]))
    return near_foreground(depth(source.video[0])) if depth is not None else None


def _by_plain_name(root: Path, records: Sequence[ClipRecord]) -> dict[str, ClipRecord]:
    found: dict[str, ClipRecord] = {}
    for record in records:
        name = plain(record.clip_id)
        if name in found:
            raise DataError(
                f"{root}: {found[name].clip_id} and {record.clip_id} would both be called {name}; rename one"
            )
        found[name] = record
    return found


def _listed(file: Path, records: Mapping[str, ClipRecord]) -> list[str]:
    """The plain names in a list file."""
    names = [plain(name) for name in read_clip_list(file)]
    if missing := [name for name in names if name not in records]:
        raise DataError(f"{file}: {len(missing)} clips of the list are not there, first {missing[0]}")
    return list(dict.fromkeys(names))


def _files_of(path: str, clip: str) -> list[str]:
    """A path itself, or the camera files that it stands for with a clip's name in it; raises DataError for none."""
    if OF_CLIP not in path:
        return [path]
    pattern = path.replace(OF_CLIP, escape(clip))
    found = sorted(glob(pattern), key=natural_key)
    if not found:
        raise DataError(f"benchmark.paths {path}: no file {pattern}; leave clip {clip} out by benchmark.clip_list")
    for file in found:
        _check_path(file)
    return found


def _content(file: Path) -> str:
    """Hash of a clip or camera file; one that cannot be read fails in its own cases."""
    try:
        return content_hash(file)
    except DataError:
        return "cannot be read"


def _camera_content(camera: Path) -> str:
    """Hash of the files that a camera is read from, and of what is chosen of them."""
    file, choice = split_name(camera)
    return text_hash(choice, *map(_content, files_of(file)))


def _check_path(path: str) -> None:
    """Raise UserError unless ``path`` opens as a camera."""
    if not is_preset(path):
        open_camera(path, intrinsics=DEFAULT_INTRINSICS, prefer="target")
