"""`geoalign budget`: output, JSON, misuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoalign.cli.budget import describe
from geoalign.cli.main import main
from geoalign.perf.budget import Walk


def test_prints_the_ladder_and_both_totals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "EXACT levers together" in text and "CHANGES levers too" in text
    numbers = json.loads(file.read_text())
    assert numbers["predicted"] is True
    assert numbers["devices"] == 64
    assert numbers["forwards_per_iteration"] == 64 * 396
    assert numbers["hours"]["changes"] < numbers["hours"]["exact"] < numbers["hours"]["reference"]
    for rung in numbers["ladder"]:
        assert rung["lever"] in text
    assert sum(numbers["share"].values()) == pytest.approx(1.0)


def test_overrides_and_guidance_change_the_prediction(tmp_path: Path) -> None:
    def hours(*arguments: str) -> dict[str, float]:
        file = tmp_path / "budget.json"
        assert main(["budget", "--config", "paper_64xa800", *arguments, "--json", str(file)]) == 0
        return json.loads(file.read_text())["hours"]

    plain, four = hours(), hours("optim.updates_per_rollout=4", "levers.streaming=off")
    assert four["reference"] == plain["reference"] and four["exact"] > plain["exact"]
    assert hours("flow.guidance=5")["reference"] > 1.9 * plain["reference"]
    assert hours("--device", "h200")["reference"] < plain["reference"]
    assert hours("window.size=2")["reference"] < plain["reference"]


def test_walks_come_from_the_schedule_of_the_run() -> None:
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config

    run, coarse, left_out = describe(load_config(Config, "paper_64xa800", []))
    assert run.walks == {Walk(start, 4, 21 - start): 25 if start < 5 else 15 for start in range(6)}
    assert set(coarse.walks) == {
        Walk(0, 4, 7),
        Walk(1, 4, 7),
        Walk(2, 4, 7),
        Walk(3, 4, 6),
        Walk(4, 4, 6),
        Walk(5, 4, 5),
    }
    assert left_out == []


def test_a_small_model_is_told_that_seconds_mean_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "tiny_cpu"]) == 0
    text = capsys.readouterr().out
    assert "kernel launches" in text and "counted as free" in text


def test_more_devices_than_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "paper_64xa800", "--devices", "100"]) == 2
    assert "1 to 64 devices" in capsys.readouterr().err
