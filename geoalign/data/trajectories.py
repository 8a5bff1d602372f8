"""The pool of raw target paths and their rescaling to walking speeds (paper eq. 8 to 14)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from geoalign.config.data import RescaleConfig, TrajectoriesConfig, TruncatedGaussian
from geoalign.data.camera_files import MULTICAM_NAME, camera_files, load_camera_files, load_multicam, multicam_files
from geoalign.data.clips import Split, is_held_out
from geoalign.data.folders import walk
from geoalign.data.omniworld import find_scene_table, find_scenes, load_scene, read_metadata, scene_id
from geoalign.data.tally import Tally
from geoalign.data.tracks import CameraTrack
from geoalign.errors import DataError
from geoalign.geometry.cameras.door import CAMERA_SUFFIXES, split_name
from geoalign.geometry.rescale import RescaleResult, RescaleSettings, SpeedLaw, rescale
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign_kernels import philox_uniform, streams

_ATTEMPTS = 256


class TrajectoryPool:
    """All usable windows of all tracks, in a fixed order.

    Args:
        tracks: tracks of at least ``num_frames`` frames; order does not matter.
        num_frames: frames of a window.
    """

    def __init__(self, tracks: Sequence[CameraTrack], num_frames: int) -> None:
        self.tracks = tuple(sorted(tracks, key=lambda track: track.name))
        self.num_frames = num_frames
        self._ends = np.cumsum([len(track.starts) for track in self.tracks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[CameraTrack, int]:
        """Track and first frame of window ``index``."""
        row = int(np.searchsorted(self._ends, index, side="right"))
        track = self.tracks[row]
        return track, track.starts[index - (int(self._ends[row]) - len(track.starts))]

    def raw(self, index: int) -> CameraTrajectory:
        """Window ``index`` ``[F]`` float64 as recorded, relative to its first frame, in the archive's unit."""
        track, start = self.locate(index)
        return track.path.frames(slice(start, start + self.num_frames)).relative_to_first()

    def fingerprint(self) -> str:
        """Hash of names, windows and poses: equal on every rank that reads the same data."""
        digest = hashlib.sha256(str(self.num_frames).encode())
        for track in self.tracks:
            digest.update(f"{track.name}{track.starts}{track.metric_scale}".encode())
            digest.update(track.path.c2w.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_pool(
    path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally, split: Split = "train"
) -> TrajectoryPool:
    """Load the tracks under ``path`` that belong to ``split``.

    Raises:
        DataError: nothing usable; the message lists what was rejected and why.
    """
    if not split_name(path)[0].exists():
        raise DataError(f"{path}: no such folder or file of camera paths; set data.root and data.trajectories.path")
    layout = config.layout if config.layout != "auto" else _guess_layout(path)
    if layout == "omniworld":
        tracks = _load_omniworld(path, num_frames, config, tally)
    else:
        tracks = (load_multicam if layout == "multicam" else load_camera_files)(path, num_frames, config, tally)
    if config.rescale.scale_mode != "truncated_gaussian":
        for track in tracks:
            if track.metric_scale is None:
                tally.reject(track.name, "no metric scale")
        tracks = [track for track in tracks if track.metric_scale is not None]
    chosen = [track for track in tracks if split == "all" or _held_out(track, config) == (split == "val")]
    if not chosen:
        raise DataError(f"{path}: no usable camera paths of split '{split}' (layout {layout})\n{tally.summary()}")
    return TrajectoryPool(chosen, num_frames)


def _held_out(track: CameraTrack, config: TrajectoriesConfig) -> bool:
    return is_held_out(track.name, config.val_fraction) if track.held_out is None else track.held_out


def _guess_layout(path: Path) -> Literal["omniworld", "multicam", "files"]:
    path = split_name(path)[0]
    if find_scenes(path) and not (path.is_file() and path.suffix in CAMERA_SUFFIXES):
        return "omniworld"
    found = path.name == MULTICAM_NAME if path.is_file() else any(file.name == MULTICAM_NAME for file in walk(path))
    return "multicam" if found else "files"


def list_path_files(path: Path, config: TrajectoriesConfig) -> list[Path]:
    """The scenes or camera files that :func:`load_pool` would read, by their names."""
    layout = config.layout if config.layout != "auto" else _guess_layout(path)
    if layout == "omniworld":
        return find_scenes(path)
    return multicam_files(path) if layout == "multicam" else camera_files(path)


def _load_omniworld(path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally) -> list[CameraTrack]:
    folder = path if path.is_dir() else path.parent
    table = folder / config.metadata if config.metadata else find_scene_table(folder)
    facts = read_metadata(table, tally) if table else {}
    found = find_scenes(path)
    scenes = {scene_id(scene): scene for scene in reversed(found)}  # the first of equal ids
    if len(scenes) < len(found):
        tally.remarks["scene found more than once, first archive or folder read"] += len(found) - len(scenes)
    unlisted = len(scenes.keys() - facts.keys())
    if table and unlisted:
        tally.remarks["scene without a row in the table: test splits and metric scale unknown"] += unlisted
    return [
        track
        for uid, scene in sorted(scenes.items())
        for track in load_scene(scene, num_frames, config, tally, facts.get(uid))
    ]


class PathRescaler:
    """Turns a raw window into a target path and counts every guard that acted."""

    def __init__(self, config: RescaleConfig) -> None:
        self._config = config
        self._settings = _settings(config, _law(config.translation), _law(config.rotation))
        self.rejected: Counter[str] = Counter()
        self.adjusted: Counter[str] = Counter()
        self.drawn = 0

    def __call__(self, raw: CameraTrajectory, metric_scale: float | None, uniforms: Sequence[float]) -> RescaleResult:
        """Rescale ``raw`` ``[F]`` with two uniforms in (0, 1); see :func:`geoalign.geometry.rescale.rescale`."""
        settings = self._settings
        if self._config.scale_mode != "truncated_gaussian":
            raw = raw.scale_translation(metric_scale or 1.0)
            settings = self._metric_settings(raw)
        result = rescale(raw, uniforms, settings)
        self.drawn += 1
        self.rejected.update(result.rejected)
        self.adjusted.update(result.adjusted)
        return result

    def _metric_settings(self, raw: CameraTrajectory) -> RescaleSettings:
        """Laws without spread at the path's own peak speeds, cut to the bounds if so configured."""
        config = self._config
        rotvec, step = raw.increments()
        peaks = (
            float(step.norm(dim=-1).max()) * config.play_fps,
            math.degrees(float(rotvec.norm(dim=-1).max())) * config.play_fps,
        )
        laws = []
        for peak, law in zip(peaks, (config.translation, config.rotation), strict=True):
            clip = config.scale_mode == "metric_then_clip"
            laws.append(SpeedLaw(peak, 0.0, law.low if clip else peak, law.high if clip else peak))
        return _settings(config, *laws)


def draw_path(
    pool: TrajectoryPool, rescaler: PathRescaler, seed: int, iteration: int, group: int
) -> tuple[int, RescaleResult]:
    """Window index and target path of a group: a pure function of (seed, iteration, group).

    Windows that a guard rejects are counted and drawn again, with the attempt as the step of the counter.

    Raises:
        DataError: no window passed the guards.
    """
    for attempt in range(_ATTEMPTS):
        uniforms = philox_uniform(3, seed, iteration, group, 0, attempt, streams.PATH).tolist()
        index = int(uniforms[0] * len(pool))
        result = rescaler(pool.raw(index), pool.locate(index)[0].metric_scale, uniforms[1:])
        if result.accepted:
            return index, result
    raise DataError(
        f"no camera path passed the guards in {_ATTEMPTS} draws for group {group} of iteration {iteration}; "
        f"rejections so far: {dict(rescaler.rejected)}; see `geoalign data trajectories`"
    )


def _law(gaussian: TruncatedGaussian) -> SpeedLaw:
    return SpeedLaw(gaussian.mean, gaussian.std, gaussian.low, gaussian.high)


def _settings(config: RescaleConfig, translation: SpeedLaw, rotation: SpeedLaw) -> RescaleSettings:
    return RescaleSettings(
        mode=config.mode,
        fps=config.play_fps,
        translation=translation,
        rotation=rotation,
        static_rotation_deg=config.static_rotation_deg,
        max_rotation_scale=config.max_rotation_scale,
        max_yaw_deg=config.max_yaw_deg,
        max_path_m=config.max_path_m,
        max_outlier_ratio=config.max_outlier_ratio,
        max_raw_step_deg=config.max_step_deg,
    )
