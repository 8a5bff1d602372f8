"""Target paths in camera files of any format of the door, every camera of a file that holds several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from geoalign.config.data import TrajectoriesConfig
from geoalign.data.folders import walk
from geoalign.data.tally import Tally
from geoalign.data.tracks import CameraTrack, window_starts
from geoalign.errors import DataError
from geoalign.geometry.cameras.content import looks_like_numbers
from geoalign.geometry.cameras.door import CAMERA_SUFFIXES, OpenFile, open_file, split_name
from geoalign.geometry.cameras.options import parse_choice
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS

MULTICAM_NAME = "camera_extrinsics.json"
_MULTICAM_FPS = 15.0
_FILE_FPS = 16.0  # files do not say; the rescale replaces speeds anyway


def camera_files(path: Path) -> list[Path]:
    """Files under ``path`` that may hold cameras, by name; of texts those that begin like one. Or the file itself."""
    root = split_name(path)[0]
    return [root] if root.is_file() else [file for file in walk(root) if _may_hold_cameras(file)]


def multicam_files(path: Path) -> list[Path]:
    """All ``camera_extrinsics.json`` under ``path``, or the file itself."""
    root = split_name(path)[0]
    return [root] if root.is_file() else [file for file in walk(root) if file.name == MULTICAM_NAME]


def load_camera_files(path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally) -> list[CameraTrack]:
    """Tracks of all camera files under ``path``, or of ``FILE`` or ``FILE#CAMERA``; damaged ones go to ``tally``.

    Options behind ``#`` hold for all files of a folder.
    """
    root, chosen = split_name(path)
    tracks = []
    for file in camera_files(path):
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        tracks += _load(file, chosen, partial(_track_name, name), _FILE_FPS, num_frames, config, tally)
    return tracks


def load_multicam(path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally) -> list[CameraTrack]:
    """Tracks ``scene/camNN`` of all ``camera_extrinsics.json`` under ``path``, or of that file (``FILE#CAMERA``)."""
    root, chosen = split_name(path)
    tracks = []
    for file in multicam_files(path):
        scene = file.parent.name if root.is_file() else file.parent.relative_to(root).as_posix()
        tracks += _load(file, chosen, f"{scene}/{{}}".format, _MULTICAM_FPS, num_frames, config, tally)
    return tracks


def _load(
    file: Path,
    chosen: str,
    called: Callable[[str], str],
    fps: float,
    num_frames: int,
    config: TrajectoriesConfig,
    tally: Tally,
) -> list[CameraTrack]:
    """The tracks of one file; ``called`` gives the name of a camera's track."""
    camera_name, options = parse_choice(chosen)
    try:
        opened = open_file(file)
        cameras = _cameras(opened, camera_name)
    except DataError as error:
        tally.reject(called(camera_name), _cause(error, file, camera_name))
        return []
    tracks = []
    # The lens of the path is not used with `intrinsics: source`, so nothing is refused for it.
    lens = DEFAULT_INTRINSICS if config.intrinsics == "source" else None
    for camera in cameras:
        name = called(camera)
        try:
            found = opened.read(camera, options, intrinsics=lens)
        except DataError as error:
            tally.reject(name, _cause(error, file, camera))
            continue
        starts = window_starts([(0, found.path.num_frames)], num_frames, config.window_step)
        if not starts:
            tally.reject(name, f"fewer than {num_frames} frames")
            continue
        tally.accepted += 1
        scale = 1.0 if found.metric else None
        tracks.append(CameraTrack(name, found.path.relative_to_first(), fps, starts, metric_scale=scale))
    return tracks


def _may_hold_cameras(file: Path) -> bool:
    """Whether a file of a folder is taken for a camera file: by its suffix, but not ViPE's intrinsics, which belong to
    poses, nor texts of something else."""
    if file.suffix not in CAMERA_SUFFIXES or file.is_dir():
        return False
    if file.parent.name == "intrinsics" and (file.parent.parent / "pose" / file.name).is_file():
        return False
    return file.suffix != ".txt" or looks_like_numbers(file)


def _track_name(file: str, camera: str) -> str:
    return f"{file}#{camera}" if camera else file


def _cameras(opened: OpenFile, chosen: str) -> tuple[str, ...]:
    """The chosen camera; the target of the JSON of ``geoalign sample``; else all."""
    if chosen or "target" in opened.cameras:
        return (opened.choose(chosen, "target"),)
    return opened.cameras


def _cause(error: DataError, file: Path, camera: str) -> str:
    return str(error).removeprefix(f"{file}: ").removeprefix(f"{file}#{camera}: ")
