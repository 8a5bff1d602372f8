"""Table 3: two configurations that differ in one thing, and the recipe of docs/benchmark.md as it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from geoalign.cli.main import main
from geoalign.config.load import flatten, load_config
from geoalign.config.schema import Config

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "benchmark.md").read_text("utf-8").split("## The ablation")[1].split("\n## ")[0]
COMMANDS = [
    line.split()[1:] for line in re.sub(r"\\\n +", "", SECTION).splitlines() if line.startswith("    geoalign ")
]
SMALL = {
    "train": ["world.clips=6", "world.trajectories=8", "eval.samples=2", "train.iterations=1"],
    "benchmark": ["benchmark.max_clips=2", "benchmark.paths=[sweep_left,climb]", "benchmark.resamples=200"],
}


def test_both_configurations_differ_in_the_geometry_reward_alone() -> None:
    def told(name: str) -> dict[str, object]:
        settings = flatten(load_config(Config, name).model_dump(mode="json"))
        return {key: value for key, value in settings.items() if not key.startswith("rewards.geometry")}

    full, aesthetic = told("ablation_16gpu"), told("ablation_16gpu_aesthetic")
    assert {key for key in full if full[key] != aesthetic.get(key)} == {"run.name"} and full.keys() == aesthetic.keys()
    rewards = [set(load_config(Config, name).rewards) for name in ("ablation_16gpu", "ablation_16gpu_aesthetic")]
    assert rewards[0] - rewards[1] == {"geometry"} and rewards[1]


def test_the_recipe_trains_both_and_prints_table_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line as it is printed, at the size of smoke; then the same table from runs of other names."""
    monkeypatch.chdir(tmp_path)
    assert [command[0] for command in COMMANDS] == ["train", "train", "benchmark"]
    for command in COMMANDS:
        small = ["smoke" if word == "tiny_cpu" else word for word in command]
        assert main([*small, *SMALL[command[0]]]) == 0, command
    table = (tmp_path / "benchmarks" / "ablation" / "tables" / "table3.md").read_text()
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == ["method", "base", "aesthetic", "full"]
    assert table in capsys.readouterr().out
    changed = "benchmark.ablation=[full,truth]"
    assert main(["benchmark", "table", "benchmarks/ablation", changed]) == 0
    assert "| truth |" in capsys.readouterr().out.split("### Table 3")[1].split("###")[0]
    settings = [(tmp_path / "runs" / name / "config.yaml").read_text() for name in ("aesthetic", "full")]
    assert settings[0].count("\n") == settings[1].count("\n")  # weights and a name, no other reward
    summaries = [json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("aesthetic", "full")]
    assert all(summary["iterations"] == 1 for summary in summaries)


def test_a_weight_of_a_reward_that_is_not_there_ends_the_run_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "smoke", "rewards.geometry=null", *SMALL["train"]]) == 2
    told = capsys.readouterr().err
    assert "advantage.weights names rot, trans, but the rewards give consistency; " in told
    assert "evaluating the base" not in told and not (tmp_path / "runs" / "smoke" / "config.yaml").exists()
