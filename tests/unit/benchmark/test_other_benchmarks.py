"""Clips, paths and cameras of RealCam-Vid and Redirect4D-Bench, in folders of their published layouts."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT

from geoalign.benchmark.cases import conditions
from geoalign.benchmark.clips import FolderClips
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.data.video import write_video
from geoalign.errors import DataError, UsageError
from geoalign.geometry import so3
from geoalign.geometry.cameras.door import open_camera

FRAMES, SIZE = 5, (32, 48)
TRACKS = {"bear_x_001_seq1": ("yaw_120_pitch_0", "yaw_-60_pitch_0"), "wolf_y_002_seq1": ("yaw_30_pitch_10",)}


def world_to_camera(seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return so3.se3_exp(0.3 * torch.randn(FRAMES, 6, dtype=torch.float64, generator=generator)).numpy()


def clips_of(folder: Path, *settings: str) -> FolderClips:
    changes = ["world=null", f"benchmark.clips={folder}", "benchmark.size=[32,48]", *settings]
    return FolderClips(load_config(Config, "smoke", changes))


def test_the_tracks_of_redirect4d_have_paths_of_their_own(tmp_path: Path) -> None:
    """Source frames as its script recovers them; paths as its data set holds them, w2c of every frame."""
    truth = {}
    for seed, (track, paths) in enumerate(TRACKS.items()):
        frames = tmp_path / "sources" / "tracks" / track / "frames"
        frames.mkdir(parents=True)
        for frame in range(FRAMES):
            Image.fromarray(np.full((*SIZE, 3), 40 * seed + frame, np.uint8)).save(frames / f"{frame:05d}.png")
        for number, path in enumerate(paths):
            truth[track, path] = w2c = world_to_camera(10 * seed + number)
            file = tmp_path / "bench" / "tracks" / track / "redirected" / path / "trajectory.json"
            file.parent.mkdir(parents=True)
            entries = [{"extrinsic": pose[:3].tolist()} for pose in w2c]
            keyframes = [{"timestep": 0, "position": [0, 0, 0], "wxyz": [1, 0, 0, 0]}]
            file.write_text(json.dumps({"keyframes": keyframes, "camera_path": entries}))
    settings = tmp_path / "r4d.yaml"
    pattern = tmp_path / "bench" / "tracks" / "{clip}" / "redirected" / "*" / "trajectory.json"
    settings.write_text(f"extends: smoke\nbenchmark:\n  paths:\n    - {pattern}\n")
    changes = ["world=null", f"benchmark.clips={tmp_path / 'sources' / 'tracks'}", "benchmark.size=[32,48]"]
    clips = FolderClips(load_config(Config, str(settings), changes))
    assert clips.names == tuple(f"{track}_frames" for track in sorted(TRACKS))
    asked = conditions({name: clips.paths_of(name) for name in clips.names}, (1.0,))
    assert {(c.clip.removesuffix("_frames"), c.path_name) for c in asked} == set(truth) and len(asked) == len(truth)
    for condition in asked:
        source = clips.source(condition.clip, FRAMES)
        target = clips.target(condition, source.clip)[0]
        c2w = np.linalg.inv(truth[condition.clip.removesuffix("_frames"), condition.path_name])
        wanted = np.linalg.inv(c2w[0]) @ c2w  # its own script compares paths relative to frame 0
        np.testing.assert_allclose(target.c2w.double().numpy(), wanted, atol=1e-6)
    (tmp_path / "bench" / "tracks" / "wolf_y_002_seq1" / "redirected" / "yaw_30_pitch_10" / "trajectory.json").unlink()
    with pytest.raises(DataError, match=r"no file .*wolf_y_002_seq1.*; leave clip wolf_y_002_seq1 out"):
        clips.paths_of("wolf_y_002_seq1_frames")


def test_paths_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two cases are called bear_camera_a_speed_1"):
        conditions({"bear": ("x/a.npz", "y/a.npz")}, (1.0,))
    assert len(conditions({"bear": ("x/a.npz",), "wolf": ("y/a.npz",)}, (1.0,))) == 2
    two = conditions({"bear": ("x/a.json#cam01", "x/a.json#cam02:unit=cm")}, (1.0,))
    assert [condition.path_name for condition in two] == ["a_cam01", "a_cam02"]


def test_a_trajectory_that_is_cut_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trajectory.json"
    file.write_text(json.dumps({"camera_path": [{"extrinsic": np.eye(4)[:3].tolist()}, {"extrinsic": [1, 2]}]}))
    with pytest.raises(DataError, match=r"camera_path\[1\]\.extrinsic must be"):
        open_camera(file)


def test_realcam_vid_becomes_a_table_with_metric_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published record: w2c in units of align_factor metres, fractions of the frame; one video is not there."""
    records = []
    for seed, name in enumerate(("MiraData9K/test/a.mp4", "MiraData9K/test/b.mp4", "MiraData9K/test/gone.mp4")):
        records.append({
            "dataset_source": "MiraData9K", "video_path": name, "long_caption": f"clip, no. {seed}",
            "align_factor": 2.5, "camera_extrinsics": world_to_camera(seed).astype(np.float32),
            "camera_intrinsics": np.array([0.7, 1.1, 0.5, 0.5], np.float32),
        })  # fmt: skip
        if "gone" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            write_video(tmp_path / name, torch.full((FRAMES, *SIZE, 3), 60 * seed, dtype=torch.uint8), 12)
    np.savez(tmp_path / "RealCam-Vid_test.npz", np.array(records, dtype=object))
    script = runpy.run_path(str(ROOT / "examples" / "realcam_vid.py"))
    script["main"](str(tmp_path), str(tmp_path / "RealCam-Vid_test.npz"))
    assert "2 clips" in capsys.readouterr().out
    clips = clips_of(tmp_path)
    assert len(clips.names) == 2
    for seed, name in enumerate(clips.names):
        source = clips.source(name, FRAMES)
        assert source.caption == f"clip, no. {seed}" and "cameras" in source.told
        c2w = np.linalg.inv(world_to_camera(seed))
        wanted = np.linalg.inv(c2w[0]) @ c2w
        wanted[:, :3, 3] *= 2.5
        np.testing.assert_allclose(source.clip.camera[0].c2w.double().numpy(), wanted, atol=2e-5)  # float32 records
        np.testing.assert_allclose(source.clip.camera.intrinsics[0, 0], [0.7, 1.1, 0.5, 0.5], atol=1e-6)
    (tmp_path / "videos.txt").write_text("MiraData9K/test/b.mp4\n")
    script["main"](str(tmp_path), str(tmp_path / "RealCam-Vid_test.npz"), str(tmp_path / "videos.txt"))
    assert clips_of(tmp_path).names == clips.names[1:]
