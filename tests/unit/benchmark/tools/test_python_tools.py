"""MEt3R, VBench and Dyn-MEt3R through stand-ins of their Python APIs, each in one process for all of its cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_tools
import pytest

from geoalign.benchmark.records import CaseFiles

FRAMES = 5
Build = Callable[..., Any]


def test_met3r(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    """Loaded once; a crash costs one case and its retry, and the next case has a new process."""
    foreign_tools.met3r(environments)
    met3r = tool("met3r", options={"device": "cpu"})
    assert met3r.metrics == ("met3r",) and not met3r.gives_poses and "NC" in met3r.licence
    result = met3r.measure(case_files, tmp_path / "out")
    assert result.status == "ok", result.cause
    # Films of 102 and 153 in [-1, 1]: float32 means of float32 differences.
    assert result.metrics == pytest.approx({"met3r": 51 / 127.5}, rel=1e-6)
    failures = {
        "raise": "raised: ValueError: no overlap",
        "nan": "incomplete output: no finite number for met3r",
    }
    for behaviour, cause in failures.items():
        foreign_tools.behave(environments, "met3r", behaviour)
        assert met3r.measure(case_files, tmp_path / "out").cause == cause
    short = dataclasses.replace(case_files, frames=FRAMES + 1)
    assert "source film.mp4 holds 5 of 6 frames" in met3r.measure(short, tmp_path / "out").cause
    assert met3r._worker.starts == 1
    foreign_tools.behave(environments, "met3r", "crash")
    met3r._worker.settings = met3r._worker.settings.model_copy(update={"retries": 0})
    result = met3r.measure(case_files, tmp_path / "out")
    assert result.cause == "died: ended by signal 11; it printed: Segmentation fault soon"


def test_vbench(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    foreign_tools.vbench(environments)
    vbench = tool("vbench", retries=0)
    result = vbench.measure(case_files, tmp_path / "out")
    assert result.status == "ok", result.cause
    # The stand-in gives the n-th dimension n + 0.5, and imaging quality a hundredth, as VBench scales it.
    values = {name: place + 0.5 for place, name in enumerate(vbench.metrics)}
    assert result.metrics == values | {"imaging_quality": 5.5 / 100} and len(values) == 6
    failures = {
        "raise": "raised: RuntimeError: clip cannot be loaded",
        "half": "raised: JSONDecodeError",
        "silent": "raised: FileNotFoundError: VBench left no subject_consistency_eval_results.json",
    }
    for behaviour, cause in failures.items():
        foreign_tools.behave(environments, "vbench", behaviour)
        result = vbench.measure(case_files, tmp_path / "out")
        assert result.cause.startswith(cause) and not result.metrics, result.cause
    assert vbench._worker.starts == 1


def test_dyn_met3r(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    """ViPE's stand-in shows a wall two metres away from a camera that moves by one pixel a frame, FeatUp's the features
    1, 2, 3 everywhere.

    With points in the middle of their pixels every target is covered, and all cosines are 1. The published evaluation
    puts them on the corners, 0.7 pixels from the nearest centre, where a radius of 0.08 does not reach: all holes, of
    which the cosine is that of (1, 2, 3) and (-1, -1, -1).
    """
    foreign_tools.vipe(environments)
    folder = foreign_tools.met3r(environments)
    options = {"pipeline": "default", "size": [32, 32], "dense": True}
    dyn = tool("dyn_met3r", "scene", options=options, retries=0)
    dyn._features.settings = dyn._features.settings.model_copy(
        update={"variables": {"TORCH_HOME": str(folder)} | dict.fromkeys(("http_proxy", "https_proxy"), "127.0.0.1:1")}
    )
    result = dyn.measure(case_files, tmp_path / "out")
    assert result.status == "ok", result.cause
    hole = -6 / math.sqrt(14 * 3)
    assert result.metrics == pytest.approx(
        {"dyn_met3r": hole, "dyn_met3r_holes": 1.0, "dyn_met3r_centred": 1.0},
        abs=1e-6,  # float32 cosines
    )
    for behaviour, cause in {"shallow": "raised: ValueError: depth/video.zip holds 4 of 5 frames"}.items():
        foreign_tools.behave(environments, "vipe", behaviour)
        assert dyn.measure(case_files, tmp_path / "out").cause.startswith(cause)
    foreign_tools.behave(environments, "vipe", "well")
    short = dataclasses.replace(case_files, frames=FRAMES - 1)
    assert dyn.measure(short, tmp_path / "out").cause.startswith("raised: ValueError: depth/video.zip holds 5 of 4")
