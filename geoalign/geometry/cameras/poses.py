"""What a camera file says of one camera, before anything is converted, and what a format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.cameras.content import Content
from geoalign.geometry.cameras.options import CameraOptions, Fit
from geoalign.geometry.trajectory import CameraTrajectory

MATRICES = ((None, 4, 4), (None, 3, 4))
"""Shapes of poses, for :meth:`Content.array`."""

POSES = frozenset({"axes", "direction", "unit"})
"""The options on poses, of formats that fix all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Poses:
    """What a file says of one camera.

    Attributes:
        matrices: ``[F, 3 or 4, 4]`` float64 as the file has them.
        direction: ``c2w`` (camera-to-world) or ``w2c``.
        axes: ``opencv`` (right, down, forward) or ``opengl`` (right, up, backward) of the camera.
        unit: metres per unit of length, None where lengths are scale-free.
        stated: which of ``direction``, ``axes`` and ``unit`` the file or the rule of its format states; the others are
            the default of the format and may be replaced.
        lens: ``[4]``, ``[1, 4]`` or ``[F, 4]`` fx, fy, cx, cy, or such of ``[3, 3]`` matrices; None if the file has
            none.
        lens_unit: of ``lens``; "unknown" where the format allows both.
        frame_size: (H, W) of the frames that ``lens`` belongs to, if the file states it.
        centred: the tool puts the principal point in the middle of its frames, so that it tells their size.
        fit: how the frames of ``frame_size`` came from a video of another shape, where the format says so.
        ground_plane: ``[4]`` (n, d) in the world frame of the camera-to-world poses, or None.
    """

    matrices: NDArray[np.float64]
    direction: Literal["c2w", "w2c"] = "c2w"
    axes: Literal["opencv", "opengl"] = "opencv"
    unit: float | None = 1.0
    stated: frozenset[str] = frozenset()
    lens: NDArray[np.float64] | None = None
    lens_unit: Literal["fractions", "pixels", "unknown"] = "fractions"
    frame_size: tuple[int, int] | None = None
    centred: bool = False
    fit: Fit | None = None
    ground_plane: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class CameraFormat:
    """One format.

    Attributes:
        name: what it is called in messages.
        holds: what is in such a file, for the message that lists the formats.
        matches: whether a file is of this format.
        read: the camera of a file, by its name among ``cameras`` ("" where there is only one).
        cameras: names of the cameras of a file that holds several.
    """

    name: str
    holds: str
    matches: Callable[[Content], bool]
    read: Callable[[Content, str], Poses]
    cameras: Callable[[Content], tuple[str, ...]] = lambda content: ("",)


def camera_to_world(
    name: str, poses: Poses, options: CameraOptions, lens: Tensor
) -> tuple[CameraTrajectory, float | None, Tensor | None]:
    """Validated camera-to-world poses in OpenCV axes and metres, metres per unit of the file, and the ground plane.

    Args:
        name: of the camera, for messages.
        poses: what the file says.
        options: what the caller says; may not contradict ``poses.stated``.
        lens: fractions that broadcast to ``[F, 4]``.

    Returns:
        ``[F]`` float64; None instead of the unit where lengths are scale-free; ``[4]`` float64 or None.

    Raises:
        DataError: an option that the file contradicts, or poses that are none.
    """
    said = {"direction": poses.direction, "axes": poses.axes, "unit": poses.unit}
    given = {key: value for key, value in options.about_poses().items() if key in poses.stated and value != said[key]}
    for key in given:
        states = "lengths without a unit" if said[key] is None else f"{key} {said[key]}"
        raise DataError(f"{name}: the file or its format states {states}; drop {key}={options.text(key)}")
    matrices = poses.matrices
    if matrices.shape[1] == 3:
        last = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(matrices), 1, 4))
        matrices = np.concatenate((matrices, last), axis=1)
    path = CameraTrajectory.validated(torch.tensor(matrices), lens, name=name)
    c2w = so3.invert_rigid(path.c2w) if (options.direction or poses.direction) == "w2c" else path.c2w.clone()
    if (options.axes or poses.axes) == "opengl":
        c2w[:, :3, 1:3] *= -1
    metres = options.unit.metres if options.unit is not None else poses.unit
    c2w[:, :3, 3] *= 1.0 if metres is None else metres
    plane = None if poses.ground_plane is None else torch.from_numpy(poses.ground_plane).clone()
    if plane is not None:
        plane[3] *= 1.0 if metres is None else metres
    return CameraTrajectory.validated(c2w, path.intrinsics, name=name), metres, plane
