"""Which unit the numbers of a lens have, and of which frames: told, found or asked for, never guessed in silence.

The truth of every crop is a pinhole: a point's place in the video, followed through scaling and cutting by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geoalign.errors import DataError, UsageError
from geoalign.geometry.cameras.door import open_camera, open_target
from geoalign.geometry.cameras.options import parse_choice
from geoalign.geometry.lens import intrinsics_before_pad
from geoalign.jobs.sample import read_inputs
from geoalign.models.codec import PatchCodec

POSES = np.tile(np.eye(4), (3, 1, 1))
FULL_HD = (1080, 1920)


def lens_of(name: Path | str, video: tuple[int, int] | None = None) -> list[float]:
    camera = open_camera(name, image_size=video)
    assert camera.has_lens and bool((camera.path.intrinsics == camera.path.intrinsics[0]).all())
    return camera.path.intrinsics[0].tolist()


def vipe(folder: Path, lens: list[float]) -> Path:
    for part in ("pose", "intrinsics"):
        (folder / part).mkdir(exist_ok=True)
    np.savez(folder / "pose" / "v.npz", data=POSES, inds=np.arange(3))
    np.savez(folder / "intrinsics" / "v.npz", data=np.tile(lens, (3, 1)), inds=np.arange(3))
    return folder / "pose" / "v.npz"


def test_vipe_on_the_cropped_video_of_redirector(tmp_path: Path) -> None:
    """1920x1080 becomes 853x480 and is cut to 832: 700 pixels there are 700 * 2.25 of the source, and a bit."""
    pose = vipe(tmp_path, [700.0, 700, 416, 240])
    scaled = 853, 480
    truth = [700 / scaled[0], 700 / scaled[1], (416 + 10) / scaled[0], 0.5]
    assert lens_of(pose, FULL_HD) == pytest.approx(truth, abs=1e-12)
    assert lens_of(pose, (480, 832)) == pytest.approx([700 / 832, 700 / 480, 0.5, 0.5], abs=1e-12)
    assert lens_of(pose) == lens_of(pose, (480, 832))
    assert lens_of(pose, (960, 1664)) == lens_of(pose)  # the same shape: scaled
    # The other way round nothing tells which was cut from which.
    with pytest.raises(DataError, match=r"frames of 480x832, which have another shape .* 240x426; append #fit=crop"):
        lens_of(pose, (240, 426))
    assert lens_of(f"{pose}#fit=source", (240, 400)) == pytest.approx(
        [700 / 416 / 2 * (416 / 400), 700 / 480, 0.5, 0.5], abs=1e-12
    )
    # A lens off the middle does not tell the size, and the video's own must fit.
    off = vipe(tmp_path, [700.0, 700, 420.3, 240])
    with pytest.raises(DataError, match=r"at \(0\.22, 0\.22\) of the video's frames of 1080x1920.*#size=HEIGHTxWIDTH"):
        lens_of(off, FULL_HD)
    assert lens_of(f"{off}#size=480x832", (480, 832)) == pytest.approx([700 / 832, 700 / 480, 420.3 / 832, 0.5])
    assert lens_of(f"{off}#size=video", FULL_HD)[2] == pytest.approx(420.3 / 1920)


def test_vggt_says_its_size_by_its_principal_point(tmp_path: Path) -> None:
    """518 pixels wide, the height rounded to 14: 294 for 16:9; square frames were cut or padded, which is asked."""
    matrix = np.array([[400.0, 0, 259], [0, 400, 147], [0, 0, 1]])
    np.savez(tmp_path / "v.npz", extrinsic=POSES[:, :3], intrinsic=matrix)
    assert lens_of(tmp_path / "v.npz", FULL_HD) == pytest.approx([400 / 518, 400 / 294, 0.5, 0.5], abs=1e-12)
    matrix[1, 2] = 259
    np.savez(tmp_path / "v.npz", extrinsic=POSES[:, :3], intrinsic=matrix)
    with pytest.raises(DataError, match="518x518, which have another shape"):
        lens_of(tmp_path / "v.npz", FULL_HD)
    padded = 400 / 518, 400 / (518 * 9 / 16)
    assert lens_of(f"{tmp_path / 'v.npz'}#fit=pad", FULL_HD) == pytest.approx([*padded, 0.5, 0.5], abs=1e-12)
    cut = 400 / round(518 * 16 / 9), 400 / 518
    assert lens_of(f"{tmp_path / 'v.npz'}#fit=crop", FULL_HD) == pytest.approx([*cut, 0.5, 0.5], abs=2e-3)
    assert lens_of(f"{tmp_path / 'v.npz'}#fit=stretch", FULL_HD) == pytest.approx([400 / 518] * 2 + [0.5, 0.5])


def test_padding_is_undone() -> None:
    """A point at a quarter of a 100x200 video, scaled into 64x64: 32 rows of picture between 16 rows of padding."""
    inside = torch.tensor([1.0, 1.0, 0.25 * 64 / 64, (16 + 0.25 * 32) / 64], dtype=torch.float64)
    assert intrinsics_before_pad(inside, 100, 200, (64, 64)).tolist() == pytest.approx([1.0, 2.0, 0.25, 0.25])


@pytest.mark.parametrize("video", [None, FULL_HD, (480, 832)])
def test_a_stated_size_is_used_or_the_shape_is_noticed(tmp_path: Path, video: tuple[int, int] | None) -> None:
    matrix = np.array([[640.0, 0, 650], [0, 640, 350], [0, 0, 1]])
    np.savez(tmp_path / "c.npz", extrinsic=POSES, intrinsic=matrix, image_size=[720, 1280])
    if video == (480, 832):
        with pytest.raises(DataError, match=r"frames of 720x1280, which have another shape than the video's 480x832"):
            lens_of(tmp_path / "c.npz", video)
        cut = lens_of(f"{tmp_path / 'c.npz'}#fit=source", video)  # 853x480, ten columns off on the left
        assert cut == pytest.approx([0.5 * 853 / 832, 640 / 720, (650 / 1280 * 853 - 10) / 832, 350 / 720], abs=1e-12)
        return
    assert lens_of(tmp_path / "c.npz", video) == pytest.approx([0.5, 640 / 720, 650 / 1280, 350 / 720], abs=1e-12)


LENSES: dict[str, tuple[Any, str]] = {
    "no principal point": (np.diag([700.0, 700, 1]), "neither pixels nor fractions .* principal point"),
    "mixed": ([700.0, 700, 0.5, 0.5], "neither pixels nor fractions"),
    "unit matrix": (np.eye(3), "neither pixels nor fractions"),
    "far outside": ([700.0, 700, 2000, 240], "principal point lies at"),
    "short": ([10.0, 10, 416, 240], r"absurd focal length \(0.0120192, 0.0208333\)"),
    "short fractions": ([0.001, 0.001, 0.5, 0.5], "absurd focal length"),
    "long": ([60.0, 60, 0.5, 0.5], "absurd focal length"),
    "transposed": (np.array([[700.0, 0, 0], [0, 700, 0], [416, 240, 1]]), "transposed"),
    "skewed": (np.array([[700.0, 9, 416], [0, 700, 240], [0, 0, 1]]), "skew"),
    "infinite in float32": ([1e39, 1e39, 416, 240], "NaN or infinite intrinsics"),
    "zero in float32": ([1e-50, 1e-50, 0.5, 0.5], "not positive"),
    "negative": ([-700.0, 700, 416, 240], "not positive"),
    "one frame of another size": ([[700.0, 700, 416, 240]] * 2 + [[0.8, 1.4, 0.5, 0.5]], "neither pixels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LENSES)
def test_lenses_that_cannot_be_are_refused_with_the_fix(tmp_path: Path, kind: str) -> None:
    lens, words = LENSES[kind]
    np.savez(tmp_path / "c.npz", c2w=POSES, intrinsics=lens)
    with pytest.raises(DataError, match=rf"c\.npz: .*{words}"):
        lens_of(tmp_path / "c.npz", (480, 832))
    assert open_camera(tmp_path / "c.npz", intrinsics=(1.0, 1.0, 0.5, 0.5)).path.num_frames == 3


@pytest.mark.parametrize(("value", "words"), [(1e39, "away; wrong unit"), (2e9, "away"), (np.inf, "NaN or infinite")])
def test_positions_are_checked_in_the_precision_they_are_used_in(tmp_path: Path, value: float, words: str) -> None:
    poses = POSES.copy()
    poses[2, 0, 3] = value
    np.save(tmp_path / "c.npy", poses)
    with pytest.raises(DataError, match=f"frame 2: .*{words}"):
        open_target(tmp_path / "c.npy", 3)
    np.save(tmp_path / "c.npy", POSES * np.array([1, 1, 1, 0.0]) + np.arange(3)[:, None, None] * np.eye(4)[:, 3:] * 0)
    with pytest.raises(DataError):  # the last row is gone
        open_target(tmp_path / "c.npy", 3)
    with pytest.raises(UsageError, match="speed 1e\\+39 moves the camera"):
        open_target("zoom_in", 3, speed=1e39)


def test_planes_sizes_and_flags_are_values_and_not_truths(tmp_path: Path) -> None:
    matrix = np.array([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    good = {"extrinsic": POSES, "intrinsic": matrix, "image_size": [48, 64], "metric": True}
    for name, value, words in (
        ("metric", 2, "metric is 2"), ("metric", np.nan, "metric is nan"), ("metric", "no", "not an array of numbers"),
        ("image_size", [48.5, 64], "whole pixels"), ("image_size", [48, 1e9], "whole pixels"),
        ("image_size", [0, 64], "whole pixels"), ("ground_plane", [0, 1, 0, 1e39], "ground_plane"),
    ):  # fmt: skip
        np.savez(tmp_path / "c.npz", **(good | {name: np.array(value)}))
        with pytest.raises(DataError, match=words):
            open_camera(tmp_path / "c.npz")
    for value, metric in ((True, True), (0, False), ([1], True)):
        np.savez(tmp_path / "c.npz", **(good | {"metric": np.array(value)}))
        assert open_camera(tmp_path / "c.npz").metric is metric
    assert open_camera(f"{tmp_path / 'c.npz'}#unit=m").metric
    del good["metric"]
    np.savez(tmp_path / "c.npz", ground_plane=[0, 1, 0, 150.0], **good)
    scaled = open_camera(f"{tmp_path / 'c.npz'}#unit=cm")
    assert scaled.metric and scaled.ground_plane is not None and scaled.ground_plane[3] == 1.5
    assert not open_camera(tmp_path / "c.npz").metric


def test_options_are_read_one_way_and_checked() -> None:
    name, options = parse_choice("cam05:axes=opengl:direction=w2c:unit=cm:size=1080x1920:fit=crop")
    assert (name, options.axes, options.direction, options.size, options.fit) == (
        "cam05", "opengl", "w2c", FULL_HD, "crop"
    )  # fmt: skip
    assert options.unit is not None and options.unit.metres == 0.01
    assert parse_choice("")[0] == "" and parse_choice("a:b") == ("a:b", parse_choice("")[1])
    for text, words in (
        ("axes=up", "axes is one of opencv, opengl"), ("size=12", "HEIGHTxWIDTH"), ("size=0x5", "1 to 65536"),
        ("unit=", "unit is one of m, cm, mm, none"), ("axis=opengl", "no option 'axis'; known: axes"),
        ("axes=opengl:axes=opencv", "given twice"), ("size=9999999999999x1", "1 to 65536"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            parse_choice(text)


def test_intrinsics_that_are_typed_are_fractions(tmp_path: Path) -> None:
    for lens, words in (
        ((700.0, 700.0, 416.0, 240.0), r"principal point \(416, 240\) outside .* give fractions .* not pixels"),
        ((1e39, 1.0, 0.5, 0.5), "absurd focal length"),
    ):
        with pytest.raises(UsageError, match=rf"--intrinsics .*{words}"):
            read_inputs(tmp_path / "none.mp4", "pan_right", codec=PatchCodec(), intrinsics=lens)
