"""The camera of every frame of a video, as a file tells it, and the writer of the project's own npz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoalign.files.atomic import atomic_path
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory


@dataclass(frozen=True, slots=True, eq=False)
class CameraFile:
    """One camera that :mod:`geoalign.geometry.cameras.door` opened.

    Attributes:
        name: what was opened: a file, ``file#camera`` or a preset.
        format: name of its format.
        path: ``[F]`` float64 camera-to-world in the file's world frame.
        has_lens: whether the intrinsics of ``path`` are the file's or the caller's; otherwise they are the default.
        metric: whether lengths are metres.
        ground_plane: ``[4]`` float64 (n, d) with ``n . X = d`` in the file's world frame, or None.
    """

    name: str
    format: str
    path: CameraTrajectory
    has_lens: bool
    metric: bool = True
    ground_plane: Tensor | None = None

    def with_lens(self, intrinsics: Tensor | Sequence[float]) -> CameraFile:
        """The same camera with ``intrinsics``, fractions that broadcast to ``[F, 4]``."""
        return replace(self, path=self.path.with_intrinsics(intrinsics), has_lens=True)

    def window(self, frames: Sequence[int]) -> tuple[CameraTrajectory, Tensor | None]:
        """Poses of ``frames`` relative to the first of them, and the plane in that first camera's axes."""
        cut = self.path.frames(frames)
        if self.ground_plane is None:
            return cut.relative_to_first(), None
        first = cut.c2w[0]
        normal, distance = self.ground_plane[:3], self.ground_plane[3:]
        turned = so3.apply(first[:3, :3].T, normal)
        return cut.relative_to_first(), torch.cat([turned, distance - (normal * first[:3, 3]).sum()])


def write_clip_camera(
    path: Path,
    camera: CameraTrajectory,
    image_size: tuple[int, int],
    *,
    metric: bool = True,
    ground_plane: Tensor | None = None,
) -> None:
    """Write the project's own npz: ``extrinsic``, ``intrinsic`` (pixels), ``image_size``, ``metric``, ``ground_plane``.

    Atomic; equal input gives equal bytes. Raises RunError if the place cannot be written.

    Args:
        path: the file.
        camera: ``[F]`` camera-to-world; any world frame.
        image_size: (H, W) of the video.
        metric: whether lengths are metres.
        ground_plane: ``[4]`` (n, d) in the world frame of ``camera``.
    """
    height, width = image_size
    pixels = camera.intrinsics.double() * torch.tensor([width, height, width, height], dtype=torch.float64)
    intrinsic = torch.eye(3, dtype=torch.float64).repeat(camera.num_frames, 1, 1)
    for column, entry in enumerate(((0, 0), (1, 1), (0, 2), (1, 2))):
        intrinsic[:, *entry] = pixels[:, column]
    arrays: dict[str, Any] = {
        "extrinsic": camera.c2w.double().numpy(),
        "intrinsic": intrinsic.numpy(),
        "image_size": np.array(image_size),
        "metric": np.array(metric),
    }
    if ground_plane is not None:
        arrays["ground_plane"] = ground_plane.double().numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as file:  # of a name it would make another
        np.savez(file, **arrays)
