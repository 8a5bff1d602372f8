"""``geoalign score``: cheats lose by a margin, files are scored, wrong requests are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoalign.cli import main
from geoalign.config.world import WorldConfig
from geoalign.data.citywalk import write_clip_camera
from geoalign.data.video import write_video
from geoalign.geometry.io import save_trajectory
from geoalign.world.pairs import paired_videos

# Half of what was measured on 40 scenes (metres plus radians, weighted over frames); see docs/evaluators.md.
MARGINS = {
    "wrong_scale": 0.2,
    "frozen": 0.55,
    "reversed": 0.44,
    "black": 1.7,
    "repeated": 0.09,
    "noise": 1.7,
    "vanishing": 1.0,
}


def test_every_probe_loses_by_its_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 0
    rows = {row["probe"]: row for row in json.loads((tmp_path / "p.json").read_text())}
    assert set(rows) == {"honest", *MARGINS}
    for name, margin in MARGINS.items():
        assert rows[name]["margin"] > margin, (name, rows[name])
    assert "wrong_scale" in capsys.readouterr().out


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    world = WorldConfig()
    pairs = paired_videos(world, 1, torch.Generator().manual_seed(4), style="real")
    paths = {name: tmp_path / name for name in ("retake.mp4", "source.mp4", "source.npz", "target.json")}
    write_video(paths["retake.mp4"], pairs.truth[0], 12, lossless=True)
    write_video(paths["source.mp4"], pairs.batch.source.video[0], 12, lossless=True)
    plane = pairs.batch.source.ground_plane
    assert plane is not None
    write_clip_camera(
        paths["source.npz"], pairs.batch.source.camera[0], (world.height, world.width), ground_plane=plane[0]
    )
    save_trajectory(paths["target.json"], pairs.batch.target_camera[0])
    return paths


def test_a_true_retake_scores_within_two_centimetres(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["score", "--video", str(files["retake.mp4"]), "--trajectory", str(files["target.json"])]
    arguments += ["--source", str(files["source.mp4"]), "--source-camera", str(files["source.npz"])]
    assert main([*arguments, "--json", str(tmp_path / "s.json"), "--plot"]) == 0
    row = json.loads((tmp_path / "s.json").read_text())[0]
    assert row["valid"] and row["trans_m"] < 0.02 and row["rot_deg"] < 0.1
    assert files["retake.mp4"].with_suffix(".png").stat().st_size > 5000


def test_wrong_files_are_named(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, video = str(files["target.json"]), str(files["retake.mp4"])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(files["retake.mp4"].read_bytes()[:200])
    for arguments, code, text in (
        (["--video", str(tmp_path / "no.mp4"), "--trajectory", target], 1, "no.mp4"),
        (["--video", str(broken), "--trajectory", target], 1, "broken.mp4"),
        (["--video", video, "--trajectory", str(tmp_path / "no.json")], 1, "no.json"),
        (["--video", video, "--trajectory", target, "--evaluator", "plannar"], 2, "did you mean 'planar'"),
        (["--video", video, "--trajectory", target], 2, "ground plane"),
        (["--video", video], 2, "--trajectory"),
    ):
        assert main(["score", *arguments]) == code
        assert text in capsys.readouterr().err
