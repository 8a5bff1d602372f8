"""500 truncated or bit-flipped files: a clean result or DataError, never a crash or hang.

Runs in this process: a crash of the native decoder would take the test run down and so cannot pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geoalign.config.data import TrajectoriesConfig
from geoalign.data.omniworld import load_scene, split_record, write_archive
from geoalign.data.tally import Tally
from geoalign.data.video import PyAVReader, read_video, write_video
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.trajectory import CameraTrajectory

LENS = (0.8, 0.8 * 64 / 48, 0.5, 0.5)
PATH = CameraTrajectory.identity(8, LENS, dtype=torch.float64)


def make_video(path: Path) -> None:
    noise = torch.randint(0, 256, (8, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(path, noise.repeat_interleave(8, 1).repeat_interleave(8, 2), 12)


def read_frames(path: Path) -> None:
    PyAVReader().probe(path)
    assert read_video(path, range(8)).shape == (8, 3, 48, 64)


def read_archive(path: Path) -> None:
    tally = Tally("camera paths")
    for track in load_scene(path, 4, TrajectoriesConfig(), tally):
        assert torch.isfinite(track.path.c2w).all()
    if tally.rejected:  # defects inside an archive are counted, not raised
        raise DataError(f"{path}: {tally.summary()}")
    assert tally.accepted == 1


CASES: dict[str, tuple[int, Callable[[Path], None], Callable[[Path], object]]] = {
    "clip.mp4": (220, make_video, read_frames),
    "camera.npz": (
        140,
        lambda path: write_clip_camera(path, PATH, (48, 64)),
        lambda p: open_camera(p, image_size=(48, 64)),
    ),
    "0123456789ab_others.tar.gz": (
        140,
        lambda path: write_archive(path, [split_record(PATH, image_size=(48, 64))], fps=24),
        read_archive,
    ),
}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the end off, or flip one to eight bits anywhere."""
    if rng.random() < 0.4:
        return data[: int(rng.integers(0, len(data)))]
    flipped = bytearray(data)
    for position in rng.integers(0, len(data), int(rng.integers(1, 9))):
        flipped[position] ^= 1 << int(rng.integers(0, 8))
    return bytes(flipped)


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_end_in_an_answer_or_one_clear_error(name: str, tmp_path: Path) -> None:
    count, make, read = CASES[name]
    path = tmp_path / name
    make(path)
    sound, rng, errors = path.read_bytes(), np.random.default_rng(6), 0
    read(path)
    for _ in range(count):
        path.write_bytes(damaged(sound, rng))
        try:
            read(path)
        except DataError as error:
            errors += 1
            assert name in str(error)
    assert errors > count // 2
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
