"""Frames by index: the grey level of each test frame says which frame was read."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoalign.data.dali import DaliReader
from geoalign.data.frames import cover_crop
from geoalign.data.readers import open_reader
from geoalign.data.video import PyAVReader, VideoReader, read_video, write_video
from geoalign.errors import DataError, UsageError
from geoalign.geometry.lens import cover_crop_intrinsics

FRAMES = (torch.arange(60) * 4)[:, None, None, None].expand(60, 48, 64, 3).byte()


def indices_read(frames: torch.Tensor) -> list[int]:
    return (frames.float().mean((1, 2, 3)) / 4).round().long().tolist()


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", ".mp4"), ("libx264", ".mkv"), ("libx265", ".mp4"), ("libvpx-vp9", ".webm")]
)
def test_reads_the_frames_asked_for_with_any_group_structure(tmp_path: Path, codec: str, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    write_video(path, FRAMES, 30, codec=codec, crf=10, key_interval=12)
    for wanted in ([0], [59], [3, 17, 18, 40], [31, 30, 31], list(range(60))):
        assert indices_read(read_video(path, wanted)) == wanted
    assert PyAVReader().probe(path).frames == 60
    assert indices_read(read_video(path, start=5, stride=7, count=6)) == [5, 12, 19, 26, 33, 40]


@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "0"}, {"bf": "3", "g": "12"}])
def test_transport_streams_are_read_from_any_frame(tmp_path: Path, options: dict[str, str]) -> None:
    """They start at a time other than 0, and with B-frames a seek may land behind the key frame."""
    path = tmp_path / "c.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=30, options=options | {"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index, picture in enumerate(FRAMES.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for wanted in ([0], [59], [3, 17, 18, 40], list(range(60))):
        assert indices_read(read_video(path, wanted)) == wanted
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"c\.ts"):
        read_video(path, range(60))


def test_lossless_files_return_the_very_pixels_and_equal_bytes(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (4, 31, 45, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "a.mp4", frames, 12, lossless=True)
    write_video(tmp_path / "b.mp4", frames, 12, lossless=True)
    assert torch.equal(read_video(tmp_path / "a.mp4").permute(0, 2, 3, 1), frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(UsageError, match="even sizes"):
        write_video(tmp_path / "c.mp4", frames, 12)


def test_broken_files_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, FRAMES, 30)
    short = tmp_path / "short.mp4"
    short.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "text.mp4").write_text("not a video")
    for bad in (short, tmp_path / "text.mp4", tmp_path / "absent.mp4"):
        with pytest.raises(DataError, match=bad.name):
            read_video(bad, [0])
    with pytest.raises(DataError, match="has 60"):
        read_video(path, [60])


def test_dali_and_pyav_read_the_same_frames(tmp_path: Path) -> None:
    """A moving smooth picture: a frame off by one would fall below 30 dB (checked); readers differ in chroma only."""
    low = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    picture = torch.nn.functional.interpolate(low, size=(96, 128), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([torch.roll(picture, (2 * i, 5 * i), (1, 2)) for i in range(40)])
    path = tmp_path / "a file \u00e9.mp4"
    write_video(path, frames * 2 - 1, 30, codec="libvpx-vp9", crf=8, key_interval=12)
    dali, pyav = DaliReader(), PyAVReader()
    assert isinstance(dali, VideoReader)
    for wanted, size in ((list(range(3, 38, 4)), None), ([31, 30, 31], (40, 60))):
        theirs, ours = dali.read(path, wanted, size).float(), pyav.read(path, wanted, size).float()
        shifted = pyav.read(path, [i + 1 for i in wanted], size).float()
        assert theirs.shape == ours.shape
        psnr = [10 * torch.log10(255**2 / (theirs - other).square().mean((1, 2, 3))).min() for other in (ours, shifted)]
        assert psnr[0] >= 33 > 30 > psnr[1]
    write_video(tmp_path / "h264.mp4", FRAMES, 30)
    with pytest.raises(DataError, match="on a GPU only"):
        dali.read(tmp_path / "h264.mp4", [0])
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        dali.read(tmp_path / "cut.mp4", list(range(40)))
    assert dali.read(path, [7]).shape == (1, 3, 96, 128)  # a failure does not spoil the reader


def test_image_folders_sort_naturally(tmp_path: Path) -> None:
    import cv2

    for index in (0, 1, 2, 9, 10, 11):
        cv2.imwrite(str(tmp_path / f"f{index}.png"), FRAMES[index].numpy())
    reader = open_reader("pyav")
    assert reader.probe(tmp_path).frames == 6
    assert indices_read(reader.read(tmp_path, [2, 3, 4])) == [2, 9, 10]
    (tmp_path / "f9.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"f9\.png"):
        reader.read(tmp_path, [3])


@settings(max_examples=40, deadline=None)
@given(height=st.integers(20, 90), width=st.integers(20, 90), out=st.tuples(st.integers(8, 60), st.integers(8, 60)))
def test_intrinsics_follow_the_crop(height: int, width: int, out: tuple[int, int]) -> None:
    """Independent truth: a ramp image tells for every output pixel which input position it shows."""
    ramp = torch.linspace(0, 255, width).round().expand(3, height, width).to(torch.uint8)[None]
    shown = cover_crop(ramp, out).float()[0, 0]
    assert shown.shape == out
    lens = torch.tensor([0.8, 0.9, 0.5, 0.5], dtype=torch.float64)
    new = cover_crop_intrinsics(lens, height, width, out)
    ray = ((torch.arange(out[1]) + 0.5) / out[1] - new[2]) / new[0]  # x / z of every output column
    source = (ray * lens[0] + lens[2]) * width - 0.5
    expected = (source * 255 / (width - 1)).clamp(0, 255)
    # Rounding of the ramp and of the output is half a level each; antialiasing bends the ramp only at the border.
    inner = slice(out[1] // 4, max(out[1] * 3 // 4, out[1] // 4 + 1))
    assert (shown[out[0] // 2, inner] - expected[inner]).abs().max() <= 1.01 + 0.02 * 255 / (width - 1)
