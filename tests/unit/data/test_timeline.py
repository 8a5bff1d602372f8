"""Frame k is the k-th frame that a player shows, whatever the container says and whatever else is asked with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from films import film, numbers, remux, spelled

from geoalign.data.timeline import scan
from geoalign.data.video import PyAVReader, VideoInfo, probe_clip, read_video
from geoalign.errors import DataError

B_FRAMES = {"bf": "2", "g": "8", "crf": "10"}


def shown(path: Path) -> list[int]:
    """The numbers of all frames; probe, whole reads, windows and single frames must agree on them."""
    info, timeline = PyAVReader().probe(path), scan(path)
    whole = numbers(read_video(path))
    assert len(whole) == info.frames == timeline.frames
    windows = [[0], [3], [info.frames - 1], range(2, 7), range(info.frames // 2, info.frames), [9, 4, 9]]
    for window in windows:
        assert numbers(PyAVReader().read(path, window)) == [whole[k] for k in window], window
    with pytest.raises(DataError, match=f"it has {info.frames}"):
        read_video(path, [info.frames])
    return whole


def presentation_is_decoding(packet: Any) -> None:
    packet.pts = packet.dts


@pytest.mark.parametrize("name", ["c.mp4", "c.mkv", "c.avi", "c.ts", "c.flv", "c.h264", "c.mov"])
def test_b_frames_in_every_container(tmp_path: Path, name: str) -> None:
    """AVI and raw streams know no presentation times."""
    assert shown(film(tmp_path / name, spelled(24), options=B_FRAMES)) == list(range(24))


@pytest.mark.parametrize("name", ["lie.mp4", "lie.mkv", "lie.mov"])
def test_stamps_that_remuxing_took_from_an_avi(tmp_path: Path, name: str) -> None:
    source = film(tmp_path / "c.avi", spelled(24), options=B_FRAMES)
    path = remux(source, tmp_path / name, presentation_is_decoding)
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(container.streams.video[0]) if packet.size]
    assert stamps == sorted(stamps)  # although the stream has B-frames
    assert shown(path) == list(range(24))


def test_stamps_of_a_codec_without_reordering_are_believed(tmp_path: Path) -> None:
    path = film(tmp_path / "c.avi", spelled(24), "mpeg4", options={"bf": "0", "q": "2"})
    assert scan(path).stamps is not None and shown(path) == list(range(24))


@pytest.mark.parametrize("b_frames", [0, 2])
def test_frames_before_an_edit_are_not_shown(tmp_path: Path, b_frames: int) -> None:
    """Cut without encoding anew: the first six frames are needed for decoding only."""
    full = film(tmp_path / "full.mp4", spelled(40), options=B_FRAMES | {"bf": str(b_frames), "g": "16"})

    def earlier(packet: Any) -> None:
        packet.pts -= 6 * 512
        packet.dts -= 6 * 512

    path = remux(full, tmp_path / "cut.mp4", earlier)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    assert shown(path) == list(range(6, 40))
    assert PyAVReader().probe(path).fps == pytest.approx(24) and PyAVReader().probe(path).constant_rate


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("name", ["cut.mkv", "cut.ts"])
def test_a_film_cut_before_an_open_group_starts_at_the_first_whole_frame(tmp_path: Path, codec: str, name: str) -> None:
    extra = "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"
    options = {"x264-params": extra} if codec == "libx264" else {"x265-params": f"log-level=none:{extra}"}
    full = film(tmp_path / f"full{Path(name).suffix}", spelled(40), codec, options=options)
    with av.open(str(full)) as source, av.open(str(tmp_path / name), "w") as target:
        stream, keys = target.add_stream_from_template(source.streams.video[0]), 0
        for packet in source.demux(source.streams.video[0]):
            keys += packet.is_keyframe
            if packet.size and keys >= 2:
                packet.stream = stream
                target.mux(packet)
    whole = shown(tmp_path / name)
    assert whole == list(range(whole[0], 40)) and whole[0] in (7, 8)


@pytest.mark.parametrize(("name", "codec"), [("c.mkv", "libx264"), ("c.webm", "libvpx-vp9"), ("c.avi", "mjpeg")])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.97])
def test_a_file_cut_anywhere_is_damaged(tmp_path: Path, name: str, codec: str, share: float) -> None:
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = film(tmp_path / name, spelled(24), codec, options={"g": "4"}, pixel_format=pixel_format)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for use in (PyAVReader().probe, read_video, lambda file: read_video(file, [0])):
        with pytest.raises(DataError, match=rf"{name}: .*"):
            use(path)


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov"])
def test_a_cut_mp4_is_damaged_even_if_its_index_is_whole(tmp_path: Path, flags: str) -> None:
    source = film(tmp_path / "c.mp4", spelled(24), options=B_FRAMES)
    whole = remux(source, tmp_path / "whole.mp4", movflags=flags)
    assert shown(whole) == list(range(24))
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    for use in (PyAVReader().probe, lambda file: read_video(file, [0])):
        with pytest.raises(DataError, match=r"cut\.mp4: cannot be decoded \(cut off"):
            use(path)


def test_a_film_shorter_than_its_stated_length_is_damaged(tmp_path: Path) -> None:
    """A flv states seconds, not bytes; here it ends with a whole tag."""
    whole = film(tmp_path / "c.flv", spelled(48), options=B_FRAMES)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    path = tmp_path / "cut.flv"
    path.write_bytes(whole.read_bytes()[: packets[24].pos])
    for use in (PyAVReader().probe, lambda file: read_video(file, [0])):
        with pytest.raises(DataError, match=r"cut\.flv"):
            use(path)


def test_trailing_bytes_and_a_live_recording_are_no_damage(tmp_path: Path) -> None:
    path = film(tmp_path / "c.mp4", spelled(12), options=B_FRAMES)
    path.write_bytes(path.read_bytes() + b"left by some tool " * 3)
    assert PyAVReader().probe(path).frames == 12
    live = remux(path, tmp_path / "live.mkv", live="1")
    assert PyAVReader().probe(live).frames == 12


def test_a_variable_rate_is_refused_where_clips_are_used(tmp_path: Path) -> None:
    stamps = [k if k < 12 else 12 + 4 * (k - 12) for k in range(24)]
    for name in ("c.mp4", "c.mkv"):
        path = film(tmp_path / name, spelled(24), options=B_FRAMES, stamps=stamps)
        info = PyAVReader().probe(path)
        assert isinstance(info, VideoInfo) and not info.constant_rate and info.frames == 24
        assert numbers(read_video(path, range(8, 17))) == list(range(8, 17))  # frames stay frames
        with pytest.raises(DataError, match="variable frame rate"):
            probe_clip(PyAVReader(), path)


@pytest.mark.parametrize("name", ["10:30:00.mp4", "%03d.mp4", "-rf.mp4", "Straße 東京.mp4", "noext"])
def test_odd_names_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = film(tmp_path / "c.mp4", spelled(4))
    source.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(read_video(Path(name))) == [0, 1, 2, 3]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.mp4")  # opening it would wait for a writer
    for path in (tmp_path / "c.mp4", tmp_path):
        for use in (PyAVReader().probe, lambda file: read_video(file, [0])):
            with pytest.raises(DataError, match="not a file"):
                use(path)


def test_pictures_and_second_tracks_are_not_the_film(tmp_path: Path) -> None:
    """A cover picture as stream 0; then a film whose default track is the second."""
    cover = np.full((1, 200, 200, 3), (0, 128, 0), np.uint8)
    other = spelled(12, 48, 64)[::-1]
    for first, codec in ((cover, "mjpeg"), (other, "libx264")):
        path = tmp_path / f"{codec}.mkv"
        with av.open(str(path), "w") as container:
            streams = []
            for pixels, name in ((first, codec), (spelled(12), "libx264")):
                stream = container.add_stream(name, rate=24)
                stream.height, stream.width = pixels.shape[1:3]
                stream.pix_fmt = "yuvj420p" if name == "mjpeg" else "yuv420p"
                streams.append((stream, pixels))
            streams[0][0].disposition, streams[1][0].disposition = 0, av.stream.Disposition.default
            for stream, pixels in streams:
                for picture in pixels:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode(None))
        assert shown(path) == list(range(12))
