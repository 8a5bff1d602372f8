"""The ten ReCamMaster evaluation cameras for any length and speed, by ReDirector's resampling.

The resampling (``model_utils.py``, ``make_camera_trajectory``) is also the ground truth of the public evaluation, so it
is reproduced with its peculiarities: all frame-to-frame rotations are projected onto one axis, the increments (not the
poses) are resampled so that speed per frame is kept and total motion grows with the length, and each move is applied
in the rotation *after* its step, which bends the arcs by up to 1.3 cm.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.geometry import so3
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory

PRESETS = (
    "pan_right",
    "pan_left",
    "tilt_up",
    "tilt_down",
    "zoom_in",
    "zoom_out",
    "translate_up",
    "translate_down",
    "arc_left",
    "arc_right",
)
"""Names in the order of the published camera types 1 to 10. ``zoom`` is a dolly: the lens does not change."""

_UNREAL_TO_OPENCV = (1, 2, 0)  # columns right, up, forward out of forward, right, up


def unreal_to_opencv(rows: Tensor) -> Tensor:
    """Published row-vector matrices ``[F, 4, 4]`` (Unreal axes, centimetres) to c2w in metres relative to frame 0.

    Rows 0 to 2 are the camera's forward, right and up axes, row 3 its position. Unreal's world is left-handed, so
    absolute rotations come out as reflections; only relative poses mean anything, and those are rotations.
    """
    axes = rows[..., :3, :3].transpose(-1, -2)[..., _UNREAL_TO_OPENCV]
    axes = axes * torch.tensor([1.0, -1.0, 1.0], dtype=rows.dtype)
    position = rows[..., 3, :3] / 100
    to_first = axes[..., :1, :, :].transpose(-1, -2)
    return so3.rigid(so3.matmul(to_first, axes), so3.apply(to_first, position - position[..., :1, :]))


@lru_cache(maxsize=1)
def _published() -> dict[str, Tensor]:
    """Relative c2w ``[81, 4, 4]`` float64 of each preset, from the package data."""
    text = resources.files("geoalign.geometry").joinpath("preset_cameras.json").read_text("utf-8")
    data = json.loads(text)
    poses = {}
    for name, columns in data["cameras"].items():
        entries = [torch.tensor(c, dtype=torch.float64).expand(data["frames"]) for c in columns]
        rows = torch.zeros(data["frames"], 4, 4, dtype=torch.float64)
        rows[:, :, :3] = torch.stack(entries, -1).unflatten(-1, (4, 3))
        rows[:, 3, 3] = 1
        poses[name] = unreal_to_opencv(rows)
    return poses


def _linear(values: Tensor, count: int) -> Tensor:
    """Linear interpolation of ``[n, ...]`` at ``count`` equal fractions of [0, 1]; one sample is the first value."""
    place = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
    left = place.floor().clamp(max=len(values) - 2).long()
    fraction = (place - left).reshape(-1, *[1] * (values.ndim - 1))
    return values[left] * (1 - fraction) + values[left + 1] * fraction


def retime(c2w: Tensor, num_frames: int, speed: float = 1.0) -> Tensor:
    """ReDirector's resampling of ``[F, 4, 4]`` float64 poses to ``[num_frames, 4, 4]``, first frame identity.

    Speed per frame is that of the original times ``speed``, so the total motion scales with
    ``speed * (num_frames - 1) / (F - 1)``.

    Raises:
        UsageError: fewer than one frame, or a path of fewer than three.
    """
    if num_frames < 1 or c2w.shape[0] < 3:
        raise UsageError(f"retiming needs a path of 3 or more frames and asks for 1 or more, got {num_frames}")
    path = CameraTrajectory.build(c2w.double()).relative_to_first()
    rotvec, step = path.increments()
    fallbacks = (rotvec.sum(0), rotvec[0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    axis = next(candidate / candidate.norm() for candidate in fallbacks if candidate.norm() > 1e-12)
    angle = _linear(rotvec @ axis, num_frames - 1) * speed
    moves = _linear(step, num_frames - 1) * speed
    rotation = so3.exp(angle.cumsum(0)[:, None] * axis)
    position = so3.apply(rotation, moves).cumsum(0)
    return torch.cat((torch.eye(4, dtype=torch.float64)[None], so3.rigid(rotation, position)))


def preset_name(name: str | int) -> str:
    """Canonical name of a preset given by name or by published type 1 to 10.

    Raises:
        UsageError: unknown preset; the message names the nearest.
    """
    text = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    if text.isdigit() and 1 <= int(text) <= len(PRESETS):
        return PRESETS[int(text) - 1]
    if text in PRESETS:
        return text
    near = difflib.get_close_matches(text, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(
        f"unknown camera preset {name!r}; {hint}Choose one of {', '.join(PRESETS)}, a type 1 to 10, or a camera file."
    )


def preset(
    name: str | int,
    num_frames: int = 81,
    *,
    speed: float = 1.0,
    intrinsics: Tensor | Sequence[float] = DEFAULT_INTRINSICS,
    dtype: torch.dtype = torch.float32,
) -> CameraTrajectory:
    """One preset as a trajectory ``[num_frames]`` whose frame 0 is the identity; computed in float64.

    Raises:
        UsageError: unknown name, or a length below 1.
    """
    poses = retime(_published()[preset_name(name)], num_frames, speed)
    return CameraTrajectory.build(poses.to(dtype), intrinsics)
