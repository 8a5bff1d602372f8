"""The page that helps: four parts in every section, metrics and settings that exist, ranges that lead to it."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel
from repository import ROOT

from geoalign.config.schema import Config
from geoalign.report.ranges import PAGE, RANGES, findings, section_of

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
    listed = {re.sub(r"<\w+>", "x", name) for name in re.findall(r"`([a-z_]+/[^`]+)`", METRICS)}
    listed |= {f"failures/x/{kind}" for kind in ("timeouts", "errors")}  # short in the table
    for known in RANGES:
        pattern = re.compile(re.escape(known.metric).replace(r"\*", r"\w+"))
        assert any(pattern.fullmatch(name) for name in listed) or known.metric == "time/rollout/decode_s", known.metric
        assert known.over in ("", "time/iteration_s")


def test_every_setting_that_it_names_exists() -> None:
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXT)
    names = [name for name in names if name.split(".")[0] in Config.model_fields and not name.startswith("rewards.")]
    assert len(names) > 20
    for name in names:
        section: type[BaseModel] = Config
        for part in name.split("."):
            assert part in section.model_fields, name
            section = section.model_fields[part].annotation  # type: ignore[assignment]


def test_what_is_outside_is_found_and_nothing_else() -> None:
    usual = {
        "parity/log_prob_diff_max": 0.0, "policy/ratio_max": 1.0, "policy/ratio_min": 1.0, "policy/grad_norm": 0.3,
        "policy/skipped_updates": 0.0, "advantage/trans/sigma_median": 0.02, "reward/lost_fraction": 0.1,
        "time/iteration_s": 100.0, "time/data_s": 5.0, "time/between_s": 1.0, "reward/trans": -3.0,
    }  # fmt: skip
    assert findings(usual) == []
    bad = usual | {
        "policy/ratio_max": 1.02, "policy/grad_norm": None, "advantage/rot/sigma_median": 0.0, "time/data_s": 20.0,
        "failures/hpsv3/timeouts": 2.0,
    }  # fmt: skip
    found = {finding.metric: finding for finding in findings(bad)}
    assert set(found) == {
        "policy/ratio_max", "policy/grad_norm", "advantage/rot/sigma_median", "time/data_s", "failures/hpsv3/timeouts"
    }  # fmt: skip
    assert found["time/data_s"].value == pytest.approx(0.2)
    assert found["policy/ratio_max"].link == "docs/troubleshooting.md#the-ratio-is-not-1"
    assert "policy/ratio_max" not in {finding.metric for finding in findings(bad, updates_per_rollout=2)}


def test_the_report_names_the_section_of_a_metric() -> None:
    assert section_of("failures/hpsv3/timeouts") == f"{PAGE}#samples-fail"
    assert section_of("reward/lost_fraction") == f"{PAGE}#cameras-are-lost" and section_of("data/bad_clips") == PAGE
