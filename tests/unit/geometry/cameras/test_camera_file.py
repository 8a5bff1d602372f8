"""The project's own npz: what is written is read, and planes follow the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.trajectory import CameraTrajectory

LENS = (52 / 64, 52 / 48, 0.5, 0.5)


def test_clip_cameras_round_trip_and_planes_follow_the_window(tmp_path: Path) -> None:
    turn = torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64).expand(8, 3)
    move = torch.tensor([0.1, 0.0, 0.5], dtype=torch.float64).expand(8, 3)
    lens = torch.tensor(LENS, dtype=torch.float64).expand(9, 4)
    path = CameraTrajectory.from_increments(turn, move, lens)
    plane = torch.tensor([0.0, 0.6, 0.8, 3.0], dtype=torch.float64)
    write_clip_camera(tmp_path / "c.npz", path, (48, 64), ground_plane=plane)
    camera = open_camera(tmp_path / "c.npz", image_size=(480, 640))
    torch.testing.assert_close(camera.path.c2w, path.c2w, atol=1e-12, rtol=0)
    torch.testing.assert_close(camera.path.intrinsics, path.intrinsics, atol=1e-12, rtol=0)
    window, moved = camera.window([3, 5, 7])
    assert moved is not None and torch.equal(window.c2w[0], torch.eye(4, dtype=torch.float64))
    # Truth: a point of the plane, expressed in the axes of frame 3, lies on the moved plane.
    points = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points -= ((points @ plane[:3] - plane[3])[:, None]) * plane[:3]
    inside = (points - path.position[3]) @ path.rotation[3]
    torch.testing.assert_close(inside @ moved[:3], moved[3].expand(50), atol=1e-12, rtol=0)
    np.savez(tmp_path / "sekai.npz", extrinsic=path.c2w.numpy(), intrinsic=[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    assert not open_camera(tmp_path / "sekai.npz", image_size=(48, 64)).metric
    np.savez(tmp_path / "bad.npz", extrinsic=np.full((3, 4, 4), np.nan), intrinsic=np.eye(3))
    with pytest.raises(DataError, match=r"bad\.npz"):
        open_camera(tmp_path / "bad.npz", image_size=(48, 64))
