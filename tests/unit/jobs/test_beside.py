"""What is found beside a video: its camera, and of a retake its source; and how much of a long video is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.presets import preset
from geoalign.jobs.sample import find_source_camera, read_inputs
from geoalign.jobs.score import Source, find_source, list_videos
from geoalign.models.codec import PatchCodec

PLANE = torch.tensor([0.0, 0.342, 0.94, 10.0])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, torch.zeros(90, 32, 48, 3, dtype=torch.uint8), 12.0)
    return path


def test_the_camera_beside_is_used_only_in_metres(clip: Path) -> None:
    assert find_source_camera(clip) == (None, "")
    beside = clip.with_suffix(".npz")
    write_clip_camera(beside, preset("pan_right", 90), (32, 48), ground_plane=PLANE)
    name, told = find_source_camera(clip)
    assert name == str(beside) and told == f"poses, lens, ground plane from {beside}, found beside the video"
    for given, parts in (
        ({"poses": False}, "lens, ground plane"), ({"lens": False}, "poses, ground plane"),
        ({"poses": False, "plane": False}, "lens"),
    ):  # fmt: skip
        assert find_source_camera(clip, **given) == (str(beside), f"{parts} from {beside}, found beside the video")
    assert find_source_camera(clip, poses=False, lens=False, plane=False) == (None, "")
    write_clip_camera(beside, preset("pan_right", 90), (32, 48), metric=False)
    name, told = find_source_camera(clip)
    assert name is None and "in metres" in told and "--source-camera" in told
    beside.write_bytes(b"PK not an archive")
    with pytest.raises(DataError, match=r"clip\.npz: damaged npz"):
        find_source_camera(clip)


@pytest.mark.parametrize(("frames", "taken"), [(None, 81), ("all", 90), (85, 85)])
def test_a_long_video_is_taken_whole_when_asked(clip: Path, frames: int | None, taken: int) -> None:
    batch, _ = read_inputs(clip, "arc_left", codec=PatchCodec(16, 5, 3), frames=frames)
    assert batch.source.video.shape[1] == batch.target_camera.num_frames == taken
    torch.testing.assert_close(batch.target_camera.c2w[0], preset("arc_left", taken).c2w, atol=1e-5, rtol=0)


def test_a_path_is_fitted_like_a_file(clip: Path) -> None:
    path = preset("arc_left", 21)
    batch, _ = read_inputs(clip, path, codec=PatchCodec(16, 5, 3), frames=81)
    torch.testing.assert_close(batch.target_camera.c2w[0], path.resample(81).c2w, atol=1e-5, rtol=0)


def test_the_record_of_a_retake_tells_its_source(clip: Path, tmp_path: Path) -> None:
    retake, record = tmp_path / "out.mp4", tmp_path / "out.json"
    assert find_source(retake, "arc_left", None, None) == Source(None, None)
    poses = torch.eye(4).repeat(5, 1, 1).tolist()
    record.write_text(json.dumps({"source_c2w": poses, "target_c2w": poses, "arguments": {"video": "old/clip.mp4"}}))
    told = Source(clip, f"{record}#source", str(record))  # the folder was moved: the clip lies beside the record
    assert find_source(retake, "arc_left", None, None) == told
    assert find_source(tmp_path / "renamed.mp4", str(record), None, None) == told
    assert find_source(retake, "arc_left", clip, None) == Source(clip, None)  # what is given is not looked up
    write_clip_camera(clip.with_suffix(".npz"), preset("pan_right", 90), (32, 48), ground_plane=PLANE)
    assert find_source(retake, "arc_left", clip, None).camera == str(clip.with_suffix(".npz"))
    for other in ('{"c2w": 3}', "{broken", "[1, 2]"):
        record.write_text(other)
        assert find_source(retake, "arc_left", None, None) == Source(None, None)


def test_side_by_side_videos_are_not_scored(tmp_path: Path) -> None:
    for name in ("out.mp4", "out.side_by_side.mp4", ".hidden.mp4", "out.json"):
        (tmp_path / name).touch()
    assert list_videos(tmp_path) == [tmp_path / "out.mp4"]
    with pytest.raises(DataError, match="no such video"):
        list_videos(tmp_path / "none.mp4")
