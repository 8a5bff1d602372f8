"""Small data sets in the published layouts, sound and with every known defect.

Every test below this folder loads this file, also on a GPU machine without pydantic and PyAV: what needs them is
imported where it is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory

if TYPE_CHECKING:
    from geoalign.config.data import DataConfig

LENS = (52 / 64, 52 / 48, 0.5, 0.5)


def counting_frames(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames ``[F, H, W, 3]`` whose grey level is 4 x index: the level tells which frame was read."""
    return (torch.arange(count) * 4)[:, None, None, None].expand(count, height, width, 3).byte()


def walk(frames: int, *, yaw_deg: float = 1.0, step: float = 0.05) -> CameraTrajectory:
    """A camera that walks forward (+z) and turns about the vertical by ``yaw_deg`` per frame."""
    turn = torch.tensor([0.0, math.radians(yaw_deg), 0.0], dtype=torch.float64).expand(frames - 1, 3)
    move = torch.tensor([0.0, 0.0, step], dtype=torch.float64).expand(frames - 1, 3)
    lens = torch.tensor(LENS, dtype=torch.float64).expand(frames, 4)
    return CameraTrajectory.from_increments(turn, move, lens)


@pytest.fixture
def world(tmp_path: Path) -> DataConfig:
    """Twelve sound clips of 9 frames and 24 sound camera paths of 7 frames."""
    from geoalign.config.data import ClipsConfig, DataConfig
    from geoalign.data.citywalk import write_metadata
    from geoalign.data.omniworld import split_record, write_archive
    from geoalign.data.video import write_video

    rows = []
    for index in range(12):
        stem = f"vid{index:02d}_{0:07d}_{9:07d}"
        folder = tmp_path / "clips" / "files" / f"vid{index:02d}"
        write_video(folder / f"{stem}.mp4", counting_frames(9), 12, lossless=True)
        write_clip_camera(folder / f"{stem}.npz", walk(9), (48, 64), ground_plane=torch.tensor([0.0, 1.0, 0.0, 2.0]))
        rows.append({"videoFile": f"{stem}.mp4", "cameraFile": f"{stem}.npz", "caption": f"Street {index}."})
    write_metadata(tmp_path / "clips" / "metadata.csv", rows)
    paths = [walk(7, yaw_deg=0.2 + 0.05 * index, step=0.01 * (1 + index)) for index in range(24)]
    records = [split_record(path, image_size=(48, 64)) for path in paths]
    write_archive(tmp_path / "trajectories" / "0123456789ab_others.tar.gz", records, fps=24)
    return DataConfig(
        root=tmp_path, cache=tmp_path / "cache", num_frames=5, height=48, width=64, clips=ClipsConfig(stride=1)
    )
