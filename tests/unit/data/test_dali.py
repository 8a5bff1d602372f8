"""DALI on its CPU decoder against PyAV, and both against the numbers that frames spell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from films import bars, film, middles, numbers, remux, spelled, tags

from geoalign.data.dali import CLIPPED, DaliReader
from geoalign.data.picture import INTERLACED
from geoalign.data.video import PyAVReader, VideoReader
from geoalign.errors import DataError

VP9 = {"g": "8", "crf": "8", "b:v": "0"}
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
DEVICES = [None, pytest.param(0, marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def dali(request: pytest.FixtureRequest) -> DaliReader:
    return DaliReader(request.param)


def vp9(path: Path, frames: np.ndarray[Any, Any] | None = None, **more: Any) -> Path:
    return film(path, spelled(24) if frames is None else frames, "libvpx-vp9", options=VP9, **more)


def wide(stream: Any) -> None:
    stream.codec_context.sample_aspect_ratio = Fraction(4, 3)


def turned(angle: int, mirrored: bool = False) -> Callable[[Any], None]:
    return lambda stream: stream.set_display_rotation(angle, mirrored, False)


def alpha(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With an opaque alpha channel."""
    return np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)


def stored(angle: int, mirrored: bool = False) -> np.ndarray[Any, Any]:
    """Pixels that :func:`turned` shows upright."""
    upright = np.flip(spelled(24), 2) if mirrored else spelled(24)
    return np.ascontiguousarray(np.rot90(upright, -angle // 90, (1, 2)))


SHOWN: dict[str, Callable[[Path], Path]] = {
    "plain mp4": lambda p: vp9(p / "c.mp4"),
    "plain webm": lambda p: vp9(p / "c.webm"),
    "portrait": lambda p: vp9(p / "c.mp4", spelled(24, 192, 128)),
    "wide pixels": lambda p: vp9(p / "c.mp4", setup=wide),
    "odd size": lambda p: vp9(p / "c.webm", spelled(24, 97, 131)),
    "vp8": lambda p: film(p / "c.webm", spelled(24), "libvpx", options={"g": "8", "auto-alt-ref": "1"}),
    "alpha": lambda p: film(p / "c.webm", alpha(spelled(24)), "libvpx-vp9", options=VP9, pixel_format="yuva420p"),
    "motion jpeg in avi": lambda p: film(
        p / "c.avi", spelled(24), "mjpeg", options={"q": "2"}, pixel_format="yuvj420p"
    ),
    "motion jpeg": lambda p: film(p / "c.mkv", spelled(24), "mjpeg", options={"q": "2"}, pixel_format="yuvj420p"),
    **{
        f"turned by {angle}{' and mirrored' * mirrored}": (
            lambda p, a=angle, m=mirrored: vp9(p / "c.mp4", stored(a, m), setup=turned(a, m))
        )
        for angle, mirrored in [(90, False), (180, False), (270, False), (0, True), (90, True)]
    },
}


@pytest.mark.parametrize("case", SHOWN)
def test_both_readers_show_the_same(tmp_path: Path, dali: DaliReader, case: str) -> None:
    path, pyav = SHOWN[case](tmp_path), PyAVReader()
    assert dali.probe(path) == pyav.probe(path)
    for wanted, size in (([0, 23, 5], None), ([17, 8, 8], (64, 64)), (list(range(24)), (50, 91))):
        theirs, ours = dali.read(path, wanted, size), pyav.read(path, wanted, size)
        assert theirs.shape == ours.shape and theirs.dtype == torch.uint8
        assert (theirs.float() - ours.float()).abs().mean() < 2.5  # a picture that lies on its side: 46
        if size is None:
            assert numbers(theirs) == numbers(ours) == wanted


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6])
def test_both_readers_agree_on_colours(tmp_path: Path, dali: DaliReader, matrix: int, full: bool) -> None:
    frames = bars(64, 192, COLOURS)
    path = vp9(
        tmp_path / "c.webm",
        frames,
        setup=tags(matrix, full=full),
        dst_colorspace={1: 1, 6: 5}[matrix],
        dst_color_range=1 + full,
    )
    for reader in (dali, PyAVReader()):
        assert np.abs(middles(reader.read(path, [1])[0], 3) - COLOURS).max() <= 4  # the other matrix: 13 to 28
    assert (CLIPPED in dali.probe(path).remarks) == (matrix == 1)


def test_untagged_hd_is_bt709_in_both_readers(tmp_path: Path, dali: DaliReader) -> None:
    path = vp9(tmp_path / "c.mp4", bars(720, 1280, COLOURS, 2), dst_colorspace=1)
    for reader in (dali, PyAVReader()):
        assert np.abs(middles(reader.read(path, [1])[0], 3) - COLOURS).max() <= 4


def test_saturated_bt709_is_off_by_what_is_documented(tmp_path: Path, dali: DaliReader) -> None:
    corners = np.array([[255, 0, 255], [255, 0, 0], [0, 255, 0], [0, 0, 0], [255, 255, 255]])
    path = vp9(tmp_path / "c.webm", bars(64, 320, corners), setup=tags(1), dst_colorspace=1)
    theirs, ours = (middles(reader.read(path, [1])[0], 5) for reader in (dali, PyAVReader()))
    assert 20 < np.abs(theirs - ours).max() <= 40
    assert np.abs(theirs - ours)[3:].max() <= 3  # black and white are exact


def second_track(path: Path) -> Path:
    with av.open(str(path / "c.webm"), "w") as container:
        for pixels in (spelled(8, 48, 64), spelled(8)):
            stream = container.add_stream("libvpx-vp9", rate=24, options=VP9)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for stream, pixels in zip(container.streams.video, (spelled(8, 48, 64), spelled(8)), strict=True):
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return path / "c.webm"


def edited(path: Path) -> Path:
    def earlier(packet: Any) -> None:
        packet.pts -= 6 * 512
        packet.dts -= 6 * 512

    return remux(vp9(path / "full.mp4"), path / "c.mp4", earlier)


def equally_stamped(path: Path) -> Path:
    """Several frames at each time stamp, which tell no order."""

    def coarser(packet: Any) -> None:
        packet.pts = packet.dts = packet.pts // 100 * 100  # milliseconds

    return remux(vp9(path / "full.mkv"), path / "c.mkv", coarser)


REFUSED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "two tracks": ("2 video tracks", second_track),
    "edit list": ("hidden frames", edited),
    "stamps that tell no order": ("time stamps that do not tell the order", equally_stamped),
    "bt2020": ("colour matrix 9", lambda p: vp9(p / "c.mp4", setup=tags(9), dst_colorspace=9)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_pyav_can_show_is_refused_with_the_fix(tmp_path: Path, dali: DaliReader, case: str) -> None:
    message, make = REFUSED[case]
    path = make(tmp_path)
    assert numbers(PyAVReader().read(path, [1, 0, 1])) == [n + 6 * (case == "edit list") for n in (1, 0, 1)]
    for use in (dali.probe, lambda file: dali.read(file, [0])):
        with pytest.raises(DataError, match=rf"{message}.*data\.clips\.reader=pyav"):
            use(path)


def test_interlaced_films_are_refused_with_the_fix(
    tmp_path: Path, dali: DaliReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DALI decodes on a CPU is never interlaced, so the film is said to be."""
    path = vp9(tmp_path / "c.mp4")
    timeline = PyAVReader().timeline(path)
    told = replace(timeline, look=replace(timeline.look, remarks=(INTERLACED,)))
    monkeypatch.setattr(PyAVReader, "timeline", lambda *_: told)
    for use in (dali.probe, lambda file: dali.read(file, [0])):
        with pytest.raises(DataError, match=r"interlaced.*data\.clips\.reader=pyav"):
            use(path)


REFUSED_BY_BOTH: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "hlg": ("HLG", lambda p: vp9(p / "c.mp4", setup=tags(9, transfer=18, primaries=9))),
    "pq": ("PQ", lambda p: vp9(p / "c.mp4", setup=tags(9, transfer=16, primaries=9))),
    "askew": ("multiple of 90", lambda p: vp9(p / "c.mp4", setup=turned(45))),
    "cut": ("cut off", lambda p: halved(vp9(p / "c.webm"))),
}


def halved(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_both_readers_refuse_the_same(tmp_path: Path, dali: DaliReader, case: str) -> None:
    message, make = REFUSED_BY_BOTH[case]
    path = make(tmp_path)
    readers: tuple[VideoReader, ...] = (dali, PyAVReader())
    for reader in readers:
        for use in (reader.probe, lambda file, reader=reader: reader.read(file, [0])):
            with pytest.raises(DataError, match=message):
                use(path)


def test_a_variable_rate_is_seen_by_both(tmp_path: Path, dali: DaliReader) -> None:
    path = vp9(tmp_path / "c.mp4", stamps=[k if k < 12 else 12 + 4 * (k - 12) for k in range(24)])
    for reader in (dali, PyAVReader()):
        assert not reader.probe(path).constant_rate
        assert numbers(reader.read(path, [3, 11, 12, 20])) == [3, 11, 12, 20]
