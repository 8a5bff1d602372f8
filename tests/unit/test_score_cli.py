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
from geoalign.rewards import registry
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.flow_pnp import FlowPnpEvaluator
from geoalign.rewards.geometry import GeometryReward
from geoalign.score_cli import PROBE_SIZES, probe_table
from geoalign.types import RetakeBatch
from geoalign.world.pairs import paired_videos

# Half of what was measured on 40 scenes (corner tracking: of the least over 16, 24 and 40, its honest score varies):
# metres plus radians, weighted over frames.
MARGINS = {
    "planar": {
        "wrong_scale": 0.2, "frozen": 0.55, "reversed": 0.44, "black": 1.7, "repeated": 0.09, "noise": 1.7,
        "vanishing": 1.0,
    },
    "flow_pnp": {
        "wrong_scale": 0.13, "frozen": 0.39, "reversed": 0.86, "black": 1.6, "repeated": 0.03, "noise": 1.6,
        "vanishing": 1.6,
    },
}  # fmt: skip


def check_probes(rows: list[dict], evaluator: str) -> None:
    assert all(set(row) == {"probe", "score", "margin"} for row in rows)
    honest, *cheats = rows
    assert honest["probe"] == "honest" and honest["margin"] == 0
    assert {row["probe"] for row in cheats} == set(MARGINS[evaluator])
    for row in cheats:
        assert row["margin"] > MARGINS[evaluator][row["probe"]], row
        assert row["margin"] == pytest.approx(honest["score"] - row["score"])


def test_every_probe_loses_by_its_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 0
    check_probes(json.loads((tmp_path / "p.json").read_text()), "planar")
    assert "wrong_scale" in capsys.readouterr().out


def test_every_probe_loses_to_corner_tracking_as_well() -> None:
    """Sixteen scenes, at the size that ``--evaluator flow_pnp`` takes."""
    height, width = (int(side) for side in PROBE_SIZES["flow_pnp"].split("x"))
    check_probes(probe_table(GeometryReward(FlowPnpEvaluator()), 16, (height, width)), "flow_pnp")


def test_a_reward_that_a_cheat_can_fool_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Generous:
        name, keys = "generous", ("all",)

        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            return RewardOutput({"all": torch.ones(len(videos))}, torch.ones(len(videos), dtype=torch.bool))

    monkeypatch.setattr(registry, "build_rewards", lambda configs: {"geometry": Generous()})
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 1
    assert {row["margin"] for row in json.loads((tmp_path / "p.json").read_text())} == {0.0}


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


def test_options_reach_the_reward_and_its_evaluator(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["score", "--video", str(files["retake.mp4"]), "--trajectory", str(files["target.json"])]
    arguments += ["--source", str(files["source.mp4"]), "--source-camera", str(files["source.npz"])]
    rows = []
    for settings in ([], ["max_translation_m=0.001"], ["evaluator_options.levels=[[4.0, 1]]"]):
        extra = [word for setting in settings for word in ("--set", setting)]
        assert main([*arguments, *extra, "--json", str(tmp_path / "s.json")]) == 0
        rows += json.loads((tmp_path / "s.json").read_text())
    plain, clamped, coarse = rows
    assert plain["trans_m"] > 0.002 and clamped["trans_m"] < 0.0011  # the reward's option
    assert coarse["trans_m"] > plain["trans_m"]  # the evaluator's: one blurred step reads worse than seven


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
        (
            ["--video", video, "--trajectory", target, "--set", "max_translation=1"],
            2,
            "did you mean 'max_translation_m'",
        ),
        (["--video", video, "--trajectory", target, "--evaluator", "mapanything"], 2, "needs checkpoint"),
        (["--evaluator", "mapanything", "--set", "evaluator_options.checkpoint=no"], 1, "hf download facebook/"),
    ):
        assert main(["score", *arguments]) == code
        assert text in capsys.readouterr().err
