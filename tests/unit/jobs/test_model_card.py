"""The model card tells what a run recorded of these very weights, and no more, whatever kind of run it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from geoalign.errors import DataError
from geoalign.jobs.model_card import model_card
from geoalign.policy.open import describe

HELD_OUT = {"presets": {stage: {"translation_error_m": value} for stage, value in (("before", 0.5), ("after", 0.25))}}


def card(name: Path) -> str:
    return model_card(name, describe("builtin:tiny_base"), layout="diffusers", rounding="every bit kept")


@pytest.mark.parametrize(
    "summary",
    [None, {}, {"commit": "abc"}, {"held_out": HELD_OUT}, {"seed": 3, "iterations": 40, "held_out": HELD_OUT}],
)
def test_a_card_holds_what_the_run_recorded(summary: dict[str, object] | None, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    for name in (tmp_path, tmp_path / "policy.safetensors"):
        text = card(name)
        recorded = summary or {}
        assert ("| seed | 3 |" in text) == ("| iterations | 40 |" in text) == ("seed" in recorded)
        assert ("0.500 | 0.250" in text) == ("held_out" in recorded) == ("None were recorded" not in text)
        assert ("| abc |" in text) == ("commit" in recorded)
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert metadata["license"] == "apache-2.0" and "geoalign sample --model FOLDER" in text
        assert "rendered world" in text  # whoever finds the card must not expect real videos


def test_an_earlier_checkpoint_does_not_take_the_numbers_of_the_last(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 3, "iterations": 40, "held_out": HELD_OUT}))
    text = card(tmp_path / "checkpoints" / "step_000012")
    assert "| iterations | 12 |" in text and "| seed | 3 |" in text and "None were recorded" in text


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    (tmp_path / "summary.json").write_text('{"held_out": {"presets": [1]}}')
    with pytest.raises(DataError, match=r"summary\.json: held_out\.presets must be a mapping"):
        card(tmp_path)
