"""``geoalign score --probes``: cheats lose by a margin, invalid samples are counted, files are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from geoalign.cli.main import main
from geoalign.evaluators.flow_pnp import FlowPnpEvaluator
from geoalign.jobs.score_probes import PROBE_SIZES, probe_table, resists
from geoalign.rewards import registry
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.probes import PROBES
from geoalign.types import RetakeBatch

# Half of what was measured on 40 scenes (corner tracking: of the least over 16, 24 and 40, its honest score varies):
# metres plus radians, weighted over frames. A probe that is not named has no camera to read: it is lost.
MARGINS = {
    "planar": {"wrong_scale": 0.2, "frozen": 0.55, "reversed": 0.46, "repeated": 0.09, "vanishing": 1.4},
    "flow_pnp": {"wrong_scale": 0.14, "frozen": 0.46, "reversed": 0.9, "repeated": 0.07},
}
COLUMNS = {"probe", "score", "margin", "advantage", "valid", "lost", "samples"}


def check_probes(rows: list[dict], evaluator: str) -> None:
    assert all(set(row) == COLUMNS for row in rows)
    honest, *cheats = rows
    assert honest["probe"] == "honest" and honest["margin"] == 0 and honest["lost"] <= 1
    assert {row["probe"] for row in cheats} == {"wrong_scale", *PROBES}
    lowest = min(row["advantage"] for row in rows)
    for row in cheats:
        assert row["valid"] == row["samples"]
        assert row["advantage"] < honest["advantage"] - 0.1, row
        margin = MARGINS[evaluator].get(row["probe"])
        if margin is None:  # nothing ranks below a video without a camera
            assert row["lost"] == row["samples"] and row["advantage"] == lowest <= -1, row
            assert row["score"] is None or math.isnan(row["score"])
        else:
            assert row["lost"] <= 1 and row["margin"] > margin, row
            assert row["margin"] == pytest.approx(honest["score"] - row["score"])


def test_every_probe_loses_by_its_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 0
    check_probes(json.loads((tmp_path / "p.json").read_text()), "planar")
    assert "wrong_scale" in capsys.readouterr().out


def test_every_probe_loses_to_corner_tracking_as_well() -> None:
    """Sixteen scenes, at the size that ``--evaluator flow_pnp`` takes."""
    check_probes(probe_table(GeometryReward(FlowPnpEvaluator()), 16, PROBE_SIZES["flow_pnp"]), "flow_pnp")


class Stub:
    """Scores every video ``score``, or as ``answers`` says call by call."""

    name, keys = "stub", ("all",)

    def __init__(self, *answers: list[float]) -> None:
        self.answers = list(answers)

    def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
        scores = torch.tensor(self.answers.pop(0)) if self.answers else torch.ones(len(videos))
        return RewardOutput({"all": scores}, torch.ones(len(scores), dtype=torch.bool))


def test_a_reward_that_a_cheat_can_fool_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "build_reward", lambda kind, options: Stub())
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 1
    assert {row["margin"] for row in json.loads((tmp_path / "p.json").read_text())} == {0.0}


def test_means_are_over_valid_samples_alone() -> None:
    nan = math.nan
    honest, first, second, *_ = probe_table(Stub([4.0, nan, 2.0], [nan, 1.0, nan], [nan, nan, nan]), 3)
    assert (honest["score"], honest["valid"], honest["samples"]) == (3.0, 2, 3)
    assert (first["score"], first["margin"], first["valid"]) == (1.0, 2.0, 1)
    assert math.isnan(second["score"]) and math.isnan(second["margin"]) and second["valid"] == 0


def test_probes_without_a_valid_sample_are_null_and_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, lost = [1.0] * 40, [math.nan] * 40
    stub = Stub(honest, lost, *[[0.0] * 40] * len(PROBES))
    monkeypatch.setattr(registry, "build_reward", lambda kind, options: stub)
    assert main(["score", "--probes", "--json", str(tmp_path / "p.json")]) == 1
    row = json.loads((tmp_path / "p.json").read_text())[1]
    nothing = dict.fromkeys(("score", "margin", "advantage"))
    assert row == {"probe": "wrong_scale", **nothing, "valid": 0, "lost": 0, "samples": 40}
    assert "0/40" in capsys.readouterr().out


def test_a_cheat_that_is_lost_in_some_scenes_must_still_rank_below() -> None:
    """Two of three scenes are unreadable: the mean score of the third alone would put the cheat ahead."""

    class Blind(Stub):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            given = super().__call__(videos, batch)
            scores = given.scores["all"]
            return RewardOutput({"all": scores}, given.valid, lost=scores.isnan())

    nan = math.nan
    rows = probe_table(Blind([1.0, 2.0, 3.0], [nan, nan, 2.5], *[[0.0, 0.0, 0.0]] * len(PROBES)), 3)
    assert (rows[1]["score"], rows[1]["margin"], rows[1]["lost"]) == (2.5, -0.5, 2)
    assert rows[1]["advantage"] < rows[0]["advantage"] and not resists(rows)
    beaten = probe_table(Blind([1.0, 2.0, 3.0], [nan] * 3, *[[0.0, 0.0, 0.0]] * len(PROBES)), 3)
    assert beaten[1]["lost"] == 3 and math.isnan(beaten[1]["score"]) and resists(beaten)
    assert not resists(probe_table(Blind([nan] * 3, *[[0.0, 0.0, 0.0]] * (len(PROBES) + 1)), 3))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--video", "a.mp4", "--plot"], "drop --video, --plot"),
        (["--trajectory", "a.json"], "drop --trajectory"),
        (["--source-camera", "a.npz", "--source", "a.mp4"], "drop --source, --source-camera"),
        (["--size", "0x0"], "at least 16 pixels"),
        (["--size", "-48x64"], "at least 16 pixels"),
        (["--size", "48"], "HEIGHTxWIDTH"),
        (["--json", "."], "is a folder"),
    ],
)
def test_probes_refuse_what_they_would_ignore(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"{arguments[0]}={arguments[1]}", *arguments[2:]]  # or "-48x64" would pass for an option
    assert main(["score", "--probes", *arguments]) == 2
    assert text in capsys.readouterr().err
