"""The page that helps: four parts in every section, metrics and settings that exist, ranges that lead to it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from repository import ROOT

from geoalign.config.schema import Config
from geoalign.report.ranges import PAGE, RANGES
from geoalign.report.run_folder import RunRecord
from geoalign.report.troubles import Finding, findings

TEXT = (ROOT / PAGE).read_text("utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=\n## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
METRICS = (ROOT / "docs" / "metrics.md").read_text("utf-8")


def anchor_of(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("title", list(SECTIONS))
def test_every_section_goes_from_symptom_to_fix(title: str) -> None:
    assert re.findall(r"^- \*\*(.+?)\.\*\*", SECTIONS[title], re.MULTILINE) == ["Symptom", "Look at", "Cause", "Fix"]


def test_every_range_leads_to_a_section_and_is_of_a_known_metric() -> None:
    anchors = {anchor_of(title) for title in SECTIONS}
    assert {known.anchor for known in RANGES} <= anchors
    listed = re.findall(r"`([a-z_]+/[^`]+)`", METRICS)
    listed += [f"failures/<scorer>/{kind}" for kind in ("timeouts", "errors")]  # short in the table
    for known in RANGES:
        example = re.sub(r"\((\w+)\|\w+\)", r"\1", known.metric.replace("([^/]+)", "some"))
        example = re.sub(r"\(\?![^)]*\)", "", example)  # names that the pattern leaves out
        assert any(re.fullmatch(re.sub(r"<\w+>", r"\\w+", name), example) for name in listed), known.metric
        assert known.over in ("", "time/iteration_s")


def test_every_error_that_sends_here_names_a_section() -> None:
    sent = {
        anchor
        for path in (ROOT / "geoalign").rglob("*.py")
        for anchor in re.findall(rf"{PAGE}#([\w-]+)", path.read_text("utf-8"))
    }
    assert {"the-ratio-is-not-1", "samples-fail", "nan-and-skipped-updates"} <= sent
    assert sent <= {anchor_of(title) for title in SECTIONS}


def test_every_setting_that_it_names_exists() -> None:
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXT)
    names = [name for name in names if name.split(".")[0] in Config.model_fields and not name.startswith("rewards.")]
    assert len(names) > 20
    for name in names:
        section: type[BaseModel] = Config
        for part in name.split("."):
            assert part in section.model_fields, name
            section = section.model_fields[part].annotation  # type: ignore[assignment]


USUAL = {
    "parity/log_prob_diff_max": 0.0, "policy/ratio_max": 1.0, "policy/ratio_min": 1.0, "policy/grad_norm": 0.3,
    "policy/skipped_updates": 0.0, "advantage/trans/sigma_max_over_median": 4.0, "reward/lost_fraction": 0.0,
    "fidelity/spearman": 0.9, "fidelity/margin": 16.0, "fidelity/bad": 0.0, "fidelity/exact_tails": 0.0,
    "time/iteration_s": 100.0, "time/data_s": 5.0, "time/between_s": 1.0, "reward/trans": -3.0,
}  # fmt: skip
SET_UP = {"time/between_s": 400.0, "advantage/trans/sigma_max_over_median": 40.0}
"""Usual in the first iteration."""


def outside(rows: list[dict[str, Any]], updates: int = 1, **ode: Any) -> dict[str, Finding]:
    """What a report of these iterations finds."""
    run = RunRecord(Path("run"), {"optim": {"updates_per_rollout": updates}, "ode": ode}, {}, {}, rows)
    return {finding.key: finding for finding in findings(run) if finding.out_of_range}


def test_what_is_outside_is_found_and_nothing_else() -> None:
    usual = [USUAL | SET_UP, USUAL, USUAL]
    assert outside(usual) == {}
    bad = USUAL | {
        "policy/ratio_max": 1.02, "policy/grad_norm": 0.0, "time/data_s": 20.0, "failures/hpsv3/timeouts": 2.0,
    }  # fmt: skip
    found = outside([*usual, bad])
    assert set(found) == {"policy/ratio_max", "policy/grad_norm", "time/data_s", "failures/hpsv3/timeouts"}
    assert found["time/data_s"].amount == "10 %"  # of 5, 5 and 20
    assert found["policy/grad_norm"].where == "in 1 of 4 iterations, at least 0 (iteration 3)"
    assert found["policy/ratio_max"].range.link == "docs/troubleshooting.md#the-ratio-is-not-1"
    assert "policy/ratio_max" not in outside([*usual, bad], updates=2)


def test_a_bad_audit_and_the_fall_back_after_it_are_troubles() -> None:
    bounds = {"audit_spearman": 0.8, "audit_margin": 10.0}
    assert outside([USUAL], **bounds) == {}
    bad = USUAL | {"fidelity/spearman": 0.7, "fidelity/margin": 9.0, "fidelity/bad": 2.0}
    fallen = {"fidelity/exact_tails": 1.0}
    found = outside([USUAL, bad, fallen, fallen], **bounds)
    assert set(found) == {f"fidelity/{name}" for name in ("spearman", "margin", "bad", "exact_tails")}
    assert {finding.range.link for finding in found.values()} == {"docs/troubleshooting.md#an-audit-is-bad"}
    assert found["fidelity/spearman"].where == "in 1 of 2 iterations, at least 0.700 (iteration 1)"
    assert found["fidelity/exact_tails"].amount == "2"
    assert set(outside([bad], audit_spearman=-1, audit_margin=None)) == {"fidelity/bad"}
    nothing_but_nan = USUAL | {"fidelity/spearman": math.nan, "fidelity/margin": math.nan, "fidelity/bad": 4.0}
    assert set(outside([nothing_but_nan], **bounds)) == {"fidelity/bad"}


def test_a_level_is_judged_by_its_mean_and_a_value_by_its_worst() -> None:
    once = [USUAL, USUAL, USUAL | {"time/data_s": 6.0, "policy/ratio_min": 0.9}, USUAL | {"time/data_s": 3.0}]
    assert set(outside(once)) == {"policy/ratio_min"}
