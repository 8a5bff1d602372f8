"""``geoalign score --probes``: cheats lose by a margin, invalid samples are counted, files are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from geoalign.cli.main import main
from geoalign.evaluators.flow_pnp import FlowPnpEvaluator
from geoalign.jobs.score_probes import PROBE_SIZES, probe_table
from geoalign.rewards import registry
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.probes import PROBES
from geoalign.types import RetakeBatch

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
    assert all(set(row) == {"probe", "score", "margin", "valid", "samples"} for row in rows)
    honest, *cheats = rows
    assert honest["probe"] == "honest" and honest["margin"] == 0
    assert {row["probe"] for row in cheats} == set(MARGINS[evaluator])
    for row in cheats:
        assert row["valid"] == row["samples"]
        assert row["margin"] > MARGINS[evaluator][row["probe"]], row
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
    assert row == {"probe": "wrong_scale", "score": None, "margin": None, "valid": 0, "samples": 40}
    assert "0/40" in capsys.readouterr().out


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
