"""The fixed small part of the reliability campaign, and the page that its result makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import LONG_S, PATIENCE_S

ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "tests" / "campaign"
PART = {
    "kills": 16, "full_disks": 3, "read_only": 1, "double_signals": 1, "two_processes": 2, "dying_ranks": 1,
    "signalled_ranks": 1, "dying_preparers": 1, "dying_workers": 1, "inputs": 44,
}  # fmt: skip


@pytest.mark.timeout(LONG_S)
def test_a_small_part_of_the_campaign_loses_nothing(tmp_path: Path) -> None:
    """Every writing verb is killed once; the whole campaign is `make campaign`."""
    counts = [word for name, count in PART.items() for word in (f"--{name.replace('_', '-')}", str(count))]
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN / "campaign.py"), "--out", str(tmp_path / "part.json"), *counts],
        env=os.environ | {"OMP_NUM_THREADS": "1", "BUDGET_S": str(LONG_S - PATIENCE_S)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    campaigns = json.loads((tmp_path / "part.json").read_text())["campaigns"]
    assert {name: campaign["tried"] for name, campaign in campaigns.items()} == {n: c for n, c in PART.items() if c}


def test_the_page_is_that_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CAMPAIGN))
    import page
    import verbs

    counts = dict.fromkeys(page.COLUMNS, 0) | {"tried": 1200, "accepted_rightly": 1199, "lost": 1}
    problem = {"campaign": "kills", "number": 7, "kind": "lost", "what": "train, operation 3 of 9: differs\nmore"}
    result = {
        "campaigns": {"kills": counts}, "problems": [problem], "seconds": 120.0, "device": "a CPU", "cores": 2,
        "versions": {"torch": "2"}, "commits": ["ab", "abc"], "wanted": {"kills": 1300},
    }  # fmt: skip
    text = page.page(result, "`train`")
    assert "| kills | 1,200 | 0 | 1,199 | 0 | 0 | 0 | 1 |" in text
    assert "a CPU, 2 cores, torch 2, commit ab, abc; 2 min" in text
    assert "**Not complete**, the time was over: kills 1,200 of 1,300." in text
    assert "- kills 7, lost: train, operation 3 of 9: differs\n" in text
    committed = ROOT / "docs" / "results" / "reliability.json"
    if committed.exists():
        known = ", ".join(f"`{verb.name}`" for verb in verbs.VERBS)
        assert (ROOT / "docs" / "reliability.md").read_text() == page.page(json.loads(committed.read_text()), known)


def test_a_result_goes_on_at_its_own_commit_or_when_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(CAMPAIGN))
    from campaign import load

    out = tmp_path / "result.json"
    assert load(out, "abc-dirty", False)["commits"] == ["abc"]
    out.write_text(
        json.dumps({"campaigns": {"kills": {"tried": 3}}, "problems": [], "seconds": 2.0, "commits": ["abc"]})
    )
    assert load(out, "abc", False)["campaigns"] and not load(out, "new", False)["campaigns"]
    assert load(out, "new", True)["campaigns"] and load(out, "new", True)["commits"] == ["abc", "new"]
