"""What a runner wrote, taken only when it is whole: numbers, the camera of a video, the scene around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoalign.benchmark.tools.worker import ToolFailure
from geoalign.errors import DataError, UserError
from geoalign.files.arrays import read_arrays
from geoalign.files.atomic import atomic_path
from geoalign.files.parsing import read_json_object
from geoalign.geometry.trajectory import CameraTrajectory

_STILL = 1e-6
"""Largest entry by which poses differ that do not differ: ViPE writes exact identities where it found no camera."""
_MAX_SCENE = 4 << 30  # bytes: 101 frames of 480x832 with depth and mask are 121 MB


def read_numbers(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The numbers called ``names`` of a runner's answer. Raises ToolFailure unless all are there and finite."""
    try:
        told = read_json_object(folder / "result.json")
    except DataError as error:
        raise ToolFailure("incomplete output", _plain(error, folder)) from error
    if missing := [name for name in names if not _is_finite(told.get(name))]:
        raise ToolFailure("incomplete output", f"no finite number for {', '.join(missing)}")
    return {name: float(told[name]) for name in names}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_camera(folder: Path, frames: int) -> CameraTrajectory:
    """The camera ``[F]`` float64 in ``poses.npz``, with the lens as fractions of the frames.

    Raises ToolFailure when frames are missing, a pose is none, or the camera never moves, which is how a tool writes
    that it found none.
    """
    found = _arrays(folder / "poses.npz", ("c2w", "frames", "intrinsics"))
    if not np.array_equal(found["frames"], np.arange(frames)):
        raise ToolFailure("incomplete output", f"the camera of {len(found['frames'])} of {frames} frames")
    try:
        camera = CameraTrajectory.validated(
            torch.from_numpy(found["c2w"].copy()), torch.from_numpy(found["intrinsics"].copy()), name="poses.npz"
        )
    except UserError as error:
        raise ToolFailure("incomplete output", str(error)) from error
    if frames > 1 and bool((camera.c2w - camera.c2w[:1]).abs().max() < _STILL):
        raise ToolFailure("identity poses", f"all {frames} poses are equal: no camera was found")
    return camera


def save_camera(path: Path, camera: CameraTrajectory) -> None:
    """Write the npz that a :class:`~geoalign.benchmark.records.ToolResult` names, whole or not at all."""
    arrays = {
        "c2w": camera.c2w.double().numpy(),
        "frames": np.arange(camera.num_frames),
        "intrinsics": camera.intrinsics.double().numpy(),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A video in three dimensions.

    Attributes:
        camera: ``[F]`` float64, the lens as fractions of the frames.
        depth: ``[F, H, W]`` float32 along the optical axis, in the unit of the camera; not positive or not finite where
            there is none.
        moving: ``[F, H, W]`` bool: pixels of moving things and of the sky.
    """

    camera: CameraTrajectory
    depth: Tensor
    moving: Tensor


def read_scene(folder: Path, frames: int) -> Scene:
    """The camera in ``poses.npz`` with depth and masks in ``scene.npz``; raises ToolFailure unless all is whole."""
    camera = read_camera(folder, frames)
    found = _arrays(folder / "scene.npz", ("depth", "moving"))
    depth, moving = found["depth"], found["moving"]
    if depth.ndim != 3 or depth.shape != moving.shape or len(depth) != frames or moving.dtype != np.bool_:
        raise ToolFailure("incomplete output", f"depth {depth.shape} and masks {moving.shape} of {frames} frames")
    return Scene(camera, torch.from_numpy(depth.astype(np.float32)), torch.from_numpy(moving.copy()))


def read_features(folder: Path, frames: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """``[F, C, H, W]`` float16 in ``features.npy``, mapped and not read: it takes some gigabytes."""
    try:
        found = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ToolFailure("incomplete output", _plain(error, folder)) from error
    if found.ndim != 4 or len(found) != frames or found.shape[2:] != size:
        raise ToolFailure("incomplete output", f"features {found.shape} of {frames} frames of {size}")
    return found


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    try:
        found = read_arrays(path, DataError, limit=_MAX_SCENE)
    except UserError as error:
        raise ToolFailure("incomplete output", _plain(error, path.parent)) from error
    if not isinstance(found, dict) or (missing := [name for name in names if name not in found]):
        raise ToolFailure("incomplete output", f"{path.name} lacks {', '.join(missing)}")
    return found


def _plain(error: Exception, folder: Path) -> str:
    """The message without the place of a folder that is gone when someone reads it."""
    return str(error).replace(f"{folder}/", "")
