"""Camera paths in single files: own npz/json, OpenCV matrices, and the ten cameras of a MultiCamVideo scene."""

from __future__ import annotations

from pathlib import Path

import torch

from geoalign.config.data import TrajectoriesConfig
from geoalign.data.tally import Tally
from geoalign.data.tracks import CameraTrack, window_starts
from geoalign.errors import DataError
from geoalign.geometry.cameras.formats import load_recammaster, load_trajectory

_SUFFIXES = frozenset({".npz", ".json", ".npy"})
_MULTICAM_NAME = "camera_extrinsics.json"
_MULTICAM_CAMERAS = 10
_MULTICAM_FPS = 15.0
_FILE_FPS = 16.0  # files do not say; the rescale replaces speeds anyway


def load_camera_files(path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally) -> list[CameraTrack]:
    """Tracks of all npz, json and npy camera files under ``path`` (metres); damaged ones go to ``tally``."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    tracks = []
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        try:
            trajectory = load_trajectory(file, dtype=torch.float64)
        except DataError as error:
            tally.reject(name, str(error).removeprefix(f"{file}: "))
            continue
        starts = window_starts([(0, trajectory.num_frames)], num_frames, config.window_step)
        if not starts:
            tally.reject(name, f"fewer than {num_frames} frames")
            continue
        tally.accepted += 1
        tracks.append(CameraTrack(name, trajectory, _FILE_FPS, starts, metric_scale=1.0))
    return tracks


def load_multicam(path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally) -> list[CameraTrack]:
    """Tracks ``scene/camNN`` of all ``camera_extrinsics.json`` under ``path`` (Unreal axes and units absorbed)."""
    files = [path] if path.is_file() else sorted(path.rglob(_MULTICAM_NAME))
    tracks = []
    for file in files:
        scene = file.parent.name if path.is_file() else file.parent.relative_to(path).as_posix()
        for camera in range(1, _MULTICAM_CAMERAS + 1):
            name = f"{scene}/cam{camera:02d}"
            try:
                trajectory = load_recammaster(file, camera)
            except DataError as error:
                tally.reject(name, str(error).removeprefix(f"{file}: "))
                continue
            starts = window_starts([(0, trajectory.num_frames)], num_frames, config.window_step)
            if not starts:
                tally.reject(name, f"fewer than {num_frames} frames")
                continue
            tally.accepted += 1
            tracks.append(CameraTrack(name, trajectory, _MULTICAM_FPS, starts, metric_scale=1.0))
    return tracks
