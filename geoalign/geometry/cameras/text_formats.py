"""Camera files that are texts of numbers, one pose a line: told apart by how many numbers a line has."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from geoalign.geometry import so3
from geoalign.geometry.cameras.content import Content, NumberLines
from geoalign.geometry.cameras.poses import POSES, Poses

_TUM, _KITTI, _RE10K = 8, 12, 19
_UNEVEN = 1.5  # a longer step than this many usual ones means that a pose between them is missing


def has_columns(content: Content, count: int) -> bool:
    """Whether the file is a text with ``count`` numbers a line."""
    return isinstance(content.data, NumberLines) and content.data.rows.shape[1] == count


def is_tum(content: Content) -> bool:
    """8 numbers a line."""
    return has_columns(content, _TUM)


def is_kitti(content: Content) -> bool:
    """12 numbers a line."""
    return has_columns(content, _KITTI)


def is_re10k(content: Content) -> bool:
    """19 numbers a line."""
    return has_columns(content, _RE10K)


def read_tum(content: Content, camera: str) -> Poses:
    """``time tx ty tz qx qy qz qw``: camera-to-world in metres, as the benchmark defines it; other tools also write
    world-to-camera or lengths without a unit, so those two may be replaced."""
    rows = content.data.rows
    _check_times(content, rows[:, 0])
    quaternions = rows[:, 4:]
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(quaternions, axis=1)
    if (off := ~(np.abs(norms - 1) < 0.01)).any():
        place = int(np.flatnonzero(off)[0])
        line = content.data.lines[place]
        raise content.error(f"line {line}: qx qy qz qw of length {norms[place]:.4g}, not 1; are the columns in order?")
    rotation = so3.matrix_from_quaternion(torch.from_numpy(quaternions / norms[:, None]))
    return Poses(so3.rigid(rotation, torch.from_numpy(rows[:, 1:4].copy())).numpy())


def read_kitti(content: Content, camera: str) -> Poses:
    """``[3, 4]`` in rows: camera-to-world in metres, OpenCV axes."""
    return Poses(content.data.rows.reshape(-1, 3, 4))


def read_re10k(content: Content, camera: str) -> Poses:
    """``microseconds fx fy cx cy k1 k2``, fractions, and ``[3, 4]`` world-to-camera in rows, without a unit."""
    rows = content.data.rows
    _check_times(content, rows[:, 0])
    if rows[:, 5:7].any():
        raise content.error("the lens is distorted (columns 6 and 7 are not 0); undistort the video first")
    return Poses(
        rows[:, 7:].reshape(-1, 3, 4), "w2c", unit=None, stated=POSES - {"unit"}, lens=rows[:, 1:5].copy(),
        lens_unit="fractions",
    )  # fmt: skip


def _check_times(content: Content, times: NDArray[np.float64]) -> None:
    """Refuse times that do not rise, or that rise unevenly: pose k is used for frame k of the video."""
    steps = np.diff(times)
    bad = ~(steps > 0) | ~np.isfinite(steps)
    if not bad.any() and len(steps):
        usual = np.median(steps)
        bad = steps > _UNEVEN * usual
    if bad.any():
        place = int(np.flatnonzero(bad)[0]) + 1
        raise content.error(
            f"line {content.data.lines[place]}: its time {times[place]:g} does not follow {times[place - 1]:g} by one "
            "even step; a pose for every frame of the video is needed: cut the video there or fill them in"
        )
