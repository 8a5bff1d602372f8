"""What a report says that the run is: true of its own settings and rewards, and of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from geoalign.config.load import load_config, to_yaml
from geoalign.config.schema import Config
from geoalign.report.page import report_page
from geoalign.report.run_folder import read_run
from geoalign.report.words import SETS
from geoalign.world.motion import PRESETS


def test_what_the_run_is_comes_from_its_own_settings_and_numbers(folder: Path) -> None:
    bare = report_page(read_run(folder), samples=0)
    assert "one metre forty" not in bare and "This run starts from" not in bare
    assert "its camera travelled 1.40 metres for each metre asked for" in bare
    settings = {"train": {"base": "runs/<b>", "iterations": 7}, "groups": {"conditions": 1, "size": 4}}
    settings |= {"data": {"num_frames": 9, "height": 48, "width": 64}, "flow": {"steps": 6}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    page = report_page(read_run(folder), samples=0)
    assert "In each of 7 iterations it makes 4 retakes of each of 1 request." in page and "runs/&lt;b&gt;" in page
    assert "9 frames of 64 \N{MULTIPLICATION SIGN} 48 pixels and takes 6 denoising steps." in page


def test_the_named_movements_are_ones_that_the_world_flies() -> None:
    """The world of these sets has a gimbal: no pan, tilt or dolly."""
    listed = re.search(r"\((.+), \.\.\.\)", SETS["presets"])
    assert listed is not None and len(listed[1].split(", ")) > 3
    kinds = {name.split("_")[0] for name in PRESETS}
    assert [word for word in listed[1].split(", ") if word not in kinds] == []


SIZES = {"data": {"num_frames": 81, "height": 480, "width": 832}, "flow": {"steps": 25}, "optim": {"trainable": "x"}}
LOOP = {"train": {"iterations": 140}, "groups": {"conditions": 64, "size": 12, "rows_per_forward": 1}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flow": {"steps": 25, "tail_steps": 5, "tail_grid": "sigma"}},
         ["is sampled on a grid of 25 denoising steps, of which 4 at a time are stochastic and learnt from",
          "CHANGES what an exact run does: flow.tail_grid=sigma , flow.tail_steps=5 ."]),
        ({"ode": {"reuse": "residual", "reuse_share": 0.4}}, ["on a grid of 25 denoising steps", "ode.reuse=residual"]),
        ({"ode": {"attention": "int8"}}, ["takes 25 denoising steps", "ode.attention=int8"]),
        ({"learn": {"window_steps": 2}},
         ["4 at a time are stochastic, and 2 of these, drawn by lot, learnt from", "learn.window_steps=2"]),
        ({"learn": {"members": 6}}, ["and learns from the 6 of them whose advantages are largest", "learn.members=6"]),
        ({"learn": {"short_frames": 49, "short_iterations": 70}},
         ["A retake has 49 frames in the first 70 iterations and 81 in the others, of 832"]),
        ({}, ["A retake has 81 frames of 832",
              "takes 25 denoising steps, of which 4 at a time are stochastic and learnt from"]),
    ],
)  # fmt: skip
def test_what_changes_a_run_is_in_its_sentences(folder: Path, settings: dict[str, Any], said: list[str]) -> None:
    section = what_is_said(folder, (), {**SIZES, **LOOP, "window": {"size": 4}, **settings})
    assert all(words in section for words in said), section
    assert ("CHANGES" in section) == bool(settings)


@pytest.mark.parametrize(
    ("preset", "said", "silent"),
    [("tiny_cpu", "takes 6 denoising steps", "CHANGES"), ("paper_64xa800_fast", "flow.tail_steps=8", "takes 25")],
)
def test_the_file_that_a_run_writes_is_understood(folder: Path, preset: str, said: str, silent: str) -> None:
    """Its words ``off`` are no booleans."""
    (folder / "config.yaml").write_text(to_yaml(load_config(Config, preset)))
    section = re.sub(r"<[^>]+>", "", report_page(read_run(folder), samples=0).partition('id="what"')[2])
    assert said in section and silent not in section


def test_settings_of_another_version_are_not_said_to_be_exact(folder: Path) -> None:
    section = what_is_said(folder, (), {**SIZES, **LOOP, "window": {"size": 4}, "nobody": {"knows": 1}})
    assert "is sampled on a grid of 25 denoising steps" in section and "CHANGES" not in section


def what_is_said(folder: Path, keys: tuple[str, ...], settings: dict[str, Any]) -> str:
    """The section on what the run is, of a run that measured rewards of these keys."""
    row = {"iteration": 0, "advantage/clip_fraction": 0.0} | {f"advantage/{key}/mean": 0.5 for key in keys}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    section = report_page(read_run(folder), samples=0).partition('id="what"')[2].partition("</section>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))


CAMERA = "those whose camera was closer to the request"


@pytest.mark.parametrize(
    ("keys", "weights", "said", "drawn"),
    [
        (("rot", "trans"), {}, [f"{CAMERA} are made", "weight: rot 1.0, trans 1.0."], "metres and degrees off and"),
        (("trans", "vlm"), {"vlm": 0.0}, [f"{CAMERA} are made", "trans 1.0. Measured without counting: vlm."],
         "metres off and again: retakes that are closer"),
        (("trans", "rot", "consistency"), {"trans": 0.0, "rot": 0.0},
         ["those that score higher in consistency are made", "Measured without counting: trans and rot."],
         "Rewards score every retake Compare with its siblings' scores and again: retakes that score higher"),
        (("rot", "VQ", "MQ"), {"rot": 2.0, "MQ": -0.5},
         [f"{CAMERA}, that score higher in VQ and that score lower in MQ"],
         "degrees off, and other scores and again: retakes that do better"),
        (("trans",), {"trans": 0.0}, ["none is made more likely in this run"], "no retake becomes more likely"),
        ((), {"trans": 1.0}, ["those that its rewards score higher are made"], "Rewards score every retake"),
    ],
)  # fmt: skip
def test_it_says_what_this_run_rewards_and_nothing_else(
    folder: Path, keys: tuple[str, ...], weights: dict[str, float], said: list[str], drawn: str
) -> None:
    told = what_is_said(folder, keys, {"advantage": {"weights": weights}})
    assert all(part in told for part in said) and drawn in told
    counts = any(weights.get(key, 1.0) > 0 for key in keys if key in ("trans", "rot"))
    for of_cameras in (CAMERA, "never told what was asked for", "reads cameras from pixels"):
        assert (of_cameras in told) == counts
    assert ("What counts" in told) == any(weights.get(key, 1.0) for key in keys)


def test_a_control_with_shuffled_advantages_is_not_said_to_learn_from_its_scores(folder: Path) -> None:
    told = what_is_said(folder, ("trans",), {"advantage": {"weights": {}}, "train": {"shuffle_advantages": True}})
    assert "drawn by lot are made more likely in this run" in told and CAMERA not in told
    assert "and again: retakes drawn by lot" in told


def test_settings_that_somebody_made_another_thing_are_left_out_of_the_sentences(folder: Path) -> None:
    told = {"groups": {"conditions": "<b>4</b>", "size": 8}, "train": {"iterations": [3]}, "advantage": {"weights": {}}}
    for weights in ({"geometry": None, "looks": "<i>", "trans": 1.5}, [1], "x"):
        told["advantage"] = {"weights": weights}
        said = what_is_said(folder, ("geometry", "looks", "trans"), told)
        page = report_page(read_run(folder)).partition('id="how"')[0]
        assert "<b>4</b>" not in page and "<i>" not in page and "In each of" not in page
        assert ("What counts, with its weight: trans 1.5." in said) == isinstance(weights, dict)
        assert (CAMERA in said) == isinstance(weights, dict)
