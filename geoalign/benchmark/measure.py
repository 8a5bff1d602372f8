"""What is measured of one case, and what becomes of a reader that fails: a status with its cause, never a gap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geoalign.benchmark.records import CaseFiles, Tool
from geoalign.errors import DataError, UserError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.table import NEEDS_PLANE
from geoalign.files.arrays import Array, read_arrays
from geoalign.files.atomic import nan_to_none
from geoalign.files.parsing import first_line
from geoalign.geometry.metrics import camera_errors, position_distances_m, sim3_translation_error, view_angles_deg
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import SourceClip

PUBLISHED_TRANS_ERR = "trans_err_published"
"""TransErr of every path as the public script means it: 0 for a path that turns in place, whatever the video does."""
_POSE_DIGITS = 5
_UNMOVED = 1e-9
"""Largest entry by which the poses of a camera that was not read differ: estimates of a still camera jitter."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reader found in one case.

    Attributes:
        status: "ok"; "failed", which is counted; or "not applicable": the reader lacks what only some clips have.
        cause: one line that says why it is not "ok".
        metrics: by name; NaN where a number is not defined (TransErr of a camera that turns in place).
        by_frame: ``frames``, ``position_m``, ``rotation_deg`` and ``c2w`` (the upper three rows relative to frame 0),
            equally long, of a reader of cameras.
    """

    status: Literal["ok", "failed", "not applicable"]
    cause: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_frame: Mapping[str, list[Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As rows hold it; NaN is None."""
        told = {"status": self.status, "cause": self.cause, "metrics": dict(self.metrics)}
        return nan_to_none(told | {"by_frame": dict(self.by_frame)})


def failed(cause: object) -> Reading:
    """A counted failure; of an exception its type and first line are told."""
    if isinstance(cause, BaseException):
        named = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
        cause = named + first_line(cause)
    return Reading("failed", str(cause))


def camera_reading(c2w: Tensor, frames: Tensor, target: CameraTrajectory) -> Reading:
    """Every camera error of one estimate.

    Args:
        c2w: ``[K, 4, 4]`` camera-to-world, any world frame.
        frames: ``[K]`` int64, which frames of the path these are.
        target: ``[F]`` wanted path.
    """
    if not bool(torch.isfinite(c2w).all()):
        return failed("no camera could be read (poses that are not finite)")
    wanted = CameraTrajectory.build(target.c2w[frames].double())
    found = CameraTrajectory.build(c2w.double())
    moves = wanted.c2w - wanted.c2w[:1]
    if float((found.c2w - found.c2w[:1]).abs().max()) <= _UNMOVED < float(moves.abs().max()):
        return failed("the same pose for every frame: the camera was lost")
    errors = camera_errors(found.c2w[None], CameraTrajectory.stack([wanted]))
    metrics = {name: float(value[0]) for name, value in errors.items()}
    metrics[PUBLISHED_TRANS_ERR] = float(sim3_translation_error(found, wanted))
    by_frame = {
        "frames": frames.tolist(),
        "position_m": position_distances_m(found, wanted).tolist(),
        "rotation_deg": view_angles_deg(found, wanted).tolist(),
        "c2w": found.relative_to_first().c2w[:, :3].numpy().round(_POSE_DIGITS).tolist(),
    }
    return Reading("ok", metrics=metrics, by_frame=by_frame)


def read_by_estimator(evaluator: PoseEvaluator, video: Tensor, source: SourceClip, target: CameraTrajectory) -> Reading:
    """The reading of an in-project estimator of ``video`` ``[1, F, 3, H, W]``; never raises for a case."""
    if evaluator.name in NEEDS_PLANE and source.ground_plane is None:
        return Reading("not applicable", "no ground plane is known of this clip")
    try:
        found = evaluator(video, source)
        return camera_reading(found.c2w[0].cpu(), found.frame_indices.cpu(), target)
    except Exception as error:
        return failed(error)


def read_by_tool(tool: Tool, files: CaseFiles, out: Path, target: CameraTrajectory) -> Reading:
    """The reading of a foreign tool: its numbers, and camera errors from the poses that it read."""
    try:
        found = tool.measure(files, out)
        if found.status != "ok":
            return failed(found.cause or f"{tool.name} said nothing of why it failed")
        if lost := [name for name in tool.metrics if not math.isfinite(found.metrics.get(name, math.nan))]:
            return failed(f"{tool.name} gave no finite {', '.join(lost)}")
        metrics = {name: float(found.metrics[name]) for name in tool.metrics}
        if not tool.gives_poses:
            return Reading("ok", metrics=metrics)
        if found.poses is None:
            return failed(f"{tool.name} wrote no poses")
        reading = camera_reading(*_poses(found.poses, files.frames), target)
    except Exception as error:
        return failed(error)
    return reading if reading.status != "ok" else Reading("ok", "", metrics | dict(reading.metrics), reading.by_frame)


def read_poses(path: Path, frames: int) -> tuple[Tensor, Tensor | None]:
    """Poses of all ``frames`` frames ``[F, 4, 4]`` and the lens ``[F, 4]``, if it is there, of a tool's npz.

    Raises DataError for a file without a pose for every frame.
    """
    c2w, numbers = _poses(path, frames)
    if len(numbers) != frames:
        raise DataError(f"{path}: poses of {len(numbers)} of the {frames} frames")
    lens = _arrays(path).get("intrinsics")
    return c2w, None if lens is None else torch.as_tensor(np.asarray(lens, dtype=np.float64))


def _arrays(path: Path) -> dict[str, Array]:
    found = read_arrays(path, DataError)
    if not isinstance(found, dict):
        raise DataError(f"{path}: an npz with c2w and frames is needed, this is an npy")
    return found


def _poses(path: Path, frames: int) -> tuple[Tensor, Tensor]:
    arrays = _arrays(path)
    try:
        poses = CameraTrajectory.validated(torch.as_tensor(arrays["c2w"]).double(), name=str(path)).c2w
        numbers = torch.as_tensor(arrays["frames"]).long()
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from error
    rising = bool((numbers.diff() > 0).all()) and len(numbers) > 1
    if poses.ndim != 3 or len(poses) != len(numbers) or not rising or numbers[0] != 0 or numbers[-1] >= frames:
        raise DataError(f"{path}: needs poses of two or more of the frames 0 to {frames - 1}, ascending from 0")
    return poses, numbers
