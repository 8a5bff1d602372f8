"""The shares of a clip that move and that are near, against areas that were painted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geoalign.benchmark.slices import annotation_folder, dynamic_share, near_foreground
from geoalign.errors import DataError

SHARES = (0.25, 0.5, 0.0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A clip in the layout of DAVIS; two instances cover a quarter, a half, and nothing of the frames."""
    frames, masks = (tmp_path / folder / "480p" / "bear" for folder in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for index, share in enumerate(SHARES):
        labels = np.zeros((48, 80), np.uint8)
        covered = int(80 * share)
        labels[:, :covered] = 1
        labels[:10, :covered] = 2
        picture = Image.fromarray(labels, mode="P")
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        picture.save(masks / f"{index:05d}.png")
        Image.new("RGB", (80, 48)).save(frames / f"{index:05d}.jpg")
    return frames


def test_the_dynamic_share_is_that_of_the_frames_that_are_used(clip: Path) -> None:
    assert dynamic_share(clip, 3) == pytest.approx(np.mean(SHARES))
    assert dynamic_share(clip, 1) == pytest.approx(0.25)
    # Cut to the middle 48 columns, of which the left 4 of the first frame and 24 of the second are covered.
    assert dynamic_share(clip, 2, (48, 48)) == pytest.approx((4 / 48 + 24 / 48) / 2)
    # Half the size: the edge lies between two pixels, and what antialiasing takes from one it gives to the other.
    assert dynamic_share(clip, 1, (24, 40)) == pytest.approx(0.25, abs=2e-3)  # levels of 255


def test_where_a_source_is_missing_there_is_no_share(clip: Path, tmp_path: Path) -> None:
    assert dynamic_share(clip, 4) is None and dynamic_share(tmp_path / "film.mp4", 1) is None
    assert annotation_folder(clip.parent / "camel") is None
    (clip.parents[2] / "Annotations" / "480p" / "bear" / "00000.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"00000.png: not a readable mask"):
        dynamic_share(clip, 1)
    assert near_foreground(None) is None and near_foreground(torch.zeros(1, 4, 4)) is None


def test_the_near_foreground_is_what_is_nearer_than_two_metres() -> None:
    depth = torch.tensor([[[0.5, 1.9, 2.0, 30.0], [0.0, torch.nan, torch.inf, -1.0]]])
    assert near_foreground(depth) == 0.5 and near_foreground(depth, 20.0) == 0.75
