"""`geoalign budget`: output, JSON, misuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoalign.cli.main import main
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.pricing import hours, left_out, plan_with_levers, run_cost
from geoalign.perf.budget import Walk, count_passes
from geoalign.perf.devices import DEVICES


def test_prints_the_ladder_and_every_rung_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "EXACT levers together" in text and "one CHANGES rung at a time" in text
    numbers = json.loads(file.read_text())
    assert numbers["predicted"] is True
    assert numbers["devices"] == 64
    assert numbers["forwards_per_iteration"] == 64 * 396
    assert numbers["hours"]["exact"] < numbers["hours"]["reference"]
    for rung in numbers["ladder"]:
        assert rung["lever"] in text
    rungs = {rung["settings"]: rung for rung in numbers["changes"]}
    assert all(rung["hours"] < numbers["hours"]["exact"] and rung["rung"] in text for rung in rungs.values())
    # A pair that was measured together is a rung; nothing is the sum of two others.
    pair, one = rungs["ode.reuse=residual ode.reuse_share=0.45 ode.attention=int8"], rungs["ode.attention=int8"]
    assert pair["hours"] < one["hours"]
    assert rungs["learn.window_steps=2"]["fidelity"] is None and not rungs["learn.window_steps=2"]["changes_videos"]
    assert "as_configured" not in numbers and "changes" not in numbers["hours"]
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
    paper = load_config(Config, "paper_64xa800", [])
    assert run_cost(paper).walks == {Walk(start, 4, 21 - start): 25 if start < 5 else 15 for start in range(6)}
    coarse = load_config(Config, "paper_64xa800", ["flow.tail_ratio=0.4"])
    assert [walk.tail for walk in run_cost(coarse).walks] == [7, 7, 7, 6, 6, 5]
    reuse = load_config(Config, "paper_64xa800", ["ode.reuse=velocity", "ode.reuse_share=0.45"])
    assert [walk.tail for walk in run_cost(reuse).walks] == [10, 9, 9, 9, 8, 8]  # 0.45 of 21 to 16, rounded up
    assert left_out(paper) == []


def test_rungs_of_learning_cost_what_their_shares_say() -> None:
    """Each against the exact run: what falls away is half of the learner, three quarters of HPSv3, and so on."""
    card = DEVICES["a800"]

    def spent(*overrides: str) -> float:
        return hours(load_config(Config, "paper_64xa800", overrides), card, 64)

    paper = load_config(Config, "paper_64xa800")
    parts = run_cost(paper).seconds(card, plan_with_levers(paper))
    whole = spent()
    assert whole == pytest.approx(parts.total / 64 / 3600)
    assert spent("learn.window_steps=2") == pytest.approx(whole - 1.02 * parts.learner / 2 / 64 / 3600)
    short = spent("data.num_frames=49")
    assert spent("learn.short_frames=49", "learn.short_iterations=140") == pytest.approx(short)
    assert short < spent("learn.short_frames=49", "learn.short_iterations=70") < whole
    video = run_cost(paper).video
    saved = video.scorers["hpsv3"] * (1 - 21 / 81) / card.reward * 140 * 12 * 1.02 / 3600
    assert spent("rewards.hpsv3.options.frame_stride=4") == pytest.approx(whole - saved)
    # Six of twelve members: fewer backwards, but they are replayed.
    chosen = load_config(Config, "paper_64xa800", ["learn.members=6", "levers.streaming=off"])
    count = count_passes(Walk(2, 4, 19), 1, 12, 1, plan_with_levers(chosen))
    assert (count.backward, count.replay) == (1 + 6 * 3, 1 + 6 * 3)


def test_the_fast_preset_says_what_it_rests_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800_fast", "--json", str(file)]) == 0
    own = json.loads(file.read_text())["as_configured"]
    assert own["hours"] <= 45.0
    assert "assumed to hold on other weights" in capsys.readouterr().out


def test_a_small_model_is_told_that_seconds_mean_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "tiny_cpu"]) == 0
    text = capsys.readouterr().out
    assert "kernel launches" in text and "counted as free" in text


def test_more_devices_than_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "paper_64xa800", "--devices", "100"]) == 2
    assert "1 to 64 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    ["7", "null", "{}", '{"t_ms_median": 1}',
     '{"t_ms_median": 1, "kind": "kernel", "impl": "ours", "gbps": "x", "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": NaN, "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": -5, "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": 5, "shape": 3}'],
)  # fmt: skip
def test_a_result_file_of_another_form_is_refused(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    command = ["budget", "--config", "paper_64xa800", "--device", "h200", "--results", str(file)]
    file.write_text('{"device": "NVIDIA H200"}\n')
    assert main(command) == 0
    capsys.readouterr()
    file.write_text('{"device": "NVIDIA H200"}\n' + row + "\n")
    code, said = main(command), capsys.readouterr().err
    if row == "{}":  # nothing was timed
        assert code == 0
    else:
        assert code == 2 and said.count("\n") == 1 and f"{file}: not a result file of `make gpu`" in said
