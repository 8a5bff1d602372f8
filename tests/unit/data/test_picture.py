"""Pixels are those that a player shows, or the file is refused; what is read all the same is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from films import bars, film, middles, numbers, remux, spelled, tags

from geoalign.data.frames import cover_crop
from geoalign.data.picture import ALPHA, INTERLACED, WIDE, square_pixels
from geoalign.data.video import PyAVReader, read_video, warn_once, write_video
from geoalign.errors import DataError

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
SHARP = {"crf": "4"}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_every_display_matrix_of_right_angles(tmp_path: Path, angle: int, mirrored: bool) -> None:
    """The file holds the upright picture turned back; the matrix (counter-clockwise, then mirrored) restores it."""
    upright = spelled(12)
    stored = np.flip(upright, 2) if mirrored else upright
    stored = np.ascontiguousarray(np.rot90(stored, -angle // 90, (1, 2)))
    path = film(
        tmp_path / "c.mp4", stored, options={"g": "4"}, setup=lambda s: s.set_display_rotation(angle, mirrored, False)
    )
    info = PyAVReader().probe(path)
    assert (info.height, info.width) == (96, 128)
    assert numbers(read_video(path, [5, 0, 11])) == [5, 0, 11]
    small = read_video(path, [7], size=(64, 64)).float()
    expected = cover_crop(torch.from_numpy(upright[7:8]).permute(0, 3, 1, 2), (64, 64)).float()
    assert (small - expected).abs().mean() < 4  # 46 if it lies on its side


def test_another_angle_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "c.mp4", spelled(3), setup=lambda stream: stream.set_display_rotation(45))
    for use in (PyAVReader().probe, read_video):
        with pytest.raises(DataError, match=r"c\.mp4: turned by an angle"):
            use(path)


@pytest.mark.parametrize(("aspect", "shown"), [((4, 3), (96, 171)), ((8, 9), (108, 128)), ((1, 1), (96, 128))])
@pytest.mark.parametrize("name", ["c.mp4", "c.mkv"])
def test_pixels_become_square(tmp_path: Path, name: str, aspect: tuple[int, int], shown: tuple[int, int]) -> None:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)

    path = film(tmp_path / name, spelled(3), setup=setup)
    info = PyAVReader().probe(path)
    assert (info.height, info.width) == shown == tuple(read_video(path, [0]).shape[-2:])
    assert numbers(read_video(path)) == [0, 1, 2]
    # A crop to the shape of the screen shows the whole width and height: both end in the boxes' row and column.
    assert numbers(read_video(path, [2], size=(48, round(48 * shown[1] / shown[0])))) == [2]


def test_a_turned_film_with_wide_pixels(tmp_path: Path) -> None:
    """The shape of a pixel belongs to the stored picture: turned by 90 degrees, wide pixels are high ones."""

    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        stream.set_display_rotation(90)

    stored = np.ascontiguousarray(np.rot90(spelled(3, 128, 96), -1, (1, 2)))
    info = PyAVReader().probe(film(tmp_path / "c.mp4", stored, setup=setup))
    assert (info.height, info.width) == (256, 96)
    assert numbers(read_video(tmp_path / "c.mp4", [2])) == [2]


def test_square_pixels_only_grow() -> None:
    assert square_pixels(576, 720, Fraction(16, 11)) == (576, 1047)
    assert square_pixels(480, 720, Fraction(8, 9)) == (540, 720)
    assert square_pixels(480, 720, Fraction(0)) == (480, 720)


@pytest.mark.parametrize("name", ["c.mp4", "c.mkv", "c.webm"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_colour_tags_are_honoured(tmp_path: Path, name: str, full: bool, matrix: int) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    scaler = {1: 1, 6: 5, 9: 9}[matrix]
    path = film(
        tmp_path / name,
        bars(64, 192, COLOURS),
        codec,
        options=SHARP if codec == "libx264" else {"crf": "4", "b:v": "0"},
        setup=tags(matrix, full=full),
        dst_colorspace=scaler,
        dst_color_range=2 if full else 1,
    )
    assert np.abs(middles(read_video(path, [1])[0], 3) - COLOURS).max() <= 4  # another matrix: 13 to 28


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [(480, 832, 5), (576, 1024, 5), (720, 1280, 1), (1280, 720, 1), (544, 1280, 1), (704, 704, 5)],
)
def test_untagged_video_is_bt709_from_720_lines_or_1280_columns(
    tmp_path: Path, height: int, width: int, matrix: int
) -> None:
    path = film(
        tmp_path / "c.mp4", bars(height, width, COLOURS), options=SHARP | {"preset": "ultrafast"}, dst_colorspace=matrix
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.colorspace == 2  # not said
    assert np.abs(middles(read_video(path, [1])[0], 3) - COLOURS).max() <= 3


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
@pytest.mark.parametrize(("height", "width"), [(96, 192), (720, 1280)])
def test_written_colours_are_tagged_and_read_back(tmp_path: Path, codec: str, height: int, width: int) -> None:
    path = tmp_path / ("c.webm" if codec == "libvpx-vp9" else "c.mp4")
    write_video(path, torch.from_numpy(bars(height, width, COLOURS)), 16, codec=codec)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)
        if codec != "libvpx-vp9":  # WebM keeps the two others too, but only in newer releases of FFmpeg
            assert (context.color_primaries, context.color_trc) == (1, 1)
        # An independent decoding of the stored numbers by the formulas of BT.709, limited range.
        stored = next(container.decode(video=0)).reformat(format="yuv444p").to_ndarray().astype(np.float64)
    y, cb, cr = ((stored[k, height // 2, [width // 6, width // 2, width * 5 // 6]]) for k in range(3))
    y, cb, cr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    shown = 255 * np.stack([red, (y - 0.2126 * red - 0.0722 * blue) / 0.7152, blue], -1)
    assert np.abs(shown - COLOURS).max() <= 4
    assert np.abs(middles(read_video(path, [1])[0], 3) - COLOURS).max() <= 4


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (8, "linear")])
@pytest.mark.parametrize(("codec", "pixel_format"), [("libx264", "yuv420p"), ("libx265", "yuv420p10le")])
def test_transfer_curves_that_would_read_flat_are_refused(
    tmp_path: Path, transfer: int, name: str, codec: str, pixel_format: str
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = film(
        tmp_path / "c.mp4",
        spelled(3),
        codec,
        options=options,
        pixel_format=pixel_format,
        setup=tags(9, transfer=transfer, primaries=9),
    )
    for use in (PyAVReader().probe, lambda file: read_video(file, [0])):
        with pytest.raises(DataError, match=rf"c\.mp4: {name}.*convert it to SDR"):
            use(path)


def test_a_matrix_that_the_scaler_does_not_know_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "c.mp4", spelled(3), pixel_format="yuv444p", setup=tags(8))  # YCgCo
    with pytest.raises(DataError, match="colour matrix 8"):
        PyAVReader().probe(path)


def with_alpha(count: int) -> np.ndarray[Any, Any]:
    frames = spelled(count)
    return np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)


REMARKED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "x264": (INTERLACED, lambda p: film(p / "c.mp4", spelled(6), options={"x264-params": "tff=1"})),
    "png": (ALPHA, lambda p: film(p / "c.mov", with_alpha(6), "png", pixel_format="rgba")),
    "vp9": (ALPHA, lambda p: film(p / "c.webm", with_alpha(6), "libvpx-vp9", pixel_format="yuva420p")),
    "wide": (WIDE, lambda p: film(p / "c.mp4", spelled(6), setup=tags(9, primaries=9))),
}


@pytest.mark.parametrize("case", REMARKED)
def test_what_is_left_as_it_is_gets_one_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    remark, make = REMARKED[case]
    path = make(tmp_path)
    info = PyAVReader().probe(path)
    assert info.remarks == (remark,)
    assert numbers(read_video(path)) == list(range(6))
    with caplog.at_level(logging.WARNING):
        warn_once(path, info.remarks)
        warn_once(path, info.remarks)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {remark}"]
    plain = film(tmp_path / "plain.mp4", spelled(2))
    assert PyAVReader().probe(plain).remarks == ()


def test_portrait_clips_keep_their_shape(tmp_path: Path) -> None:
    path = film(tmp_path / "c.mp4", spelled(4, 192, 128))
    info = PyAVReader().probe(path)
    assert (info.height, info.width) == (192, 128)
    shown = read_video(path, [3])[0]
    assert numbers(shown[None]) == [3]
    cropped = read_video(path, [3], size=(96, 128))[0]  # covers, so the centre is cut: rows 48 to 144
    assert (cropped.float() - shown[:, 48:144].float()).abs().max() == 0


def test_a_picture_that_changes_its_size_is_refused(tmp_path: Path) -> None:
    """Two films of different size in one stream, as broken-up streams are joined."""
    parts = [film(tmp_path / f"{height}.ts", spelled(12, height, 128), options={"bf": "0"}) for height in (96, 64)]
    path = tmp_path / "c.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(DataError, match=r"c\.ts"):
        read_video(path, [0, 20], size=(48, 64))


def test_tags_survive_copying_into_another_container(tmp_path: Path) -> None:
    source = film(tmp_path / "c.mp4", bars(64, 192, COLOURS), options=SHARP, setup=tags(1), dst_colorspace=1)
    for name in ("c.mkv", "c.mov", "c.flv"):
        got = middles(read_video(remux(source, tmp_path / name), [1])[0], 3)
        assert np.abs(got - COLOURS).max() <= 3
