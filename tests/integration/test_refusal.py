"""A run that refuses to go on: what it leaves in its folder, what its report says, and how it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoalign.cli.main import main
from geoalign.files.atomic import read_jsonl
from geoalign.report.page import report_page
from geoalign.report.run_folder import read_run
from geoalign.report.state import RunState

SETTINGS = (
    "--config", "smoke", "data.root=data", "run.dir=run", "world.clips=6", "world.trajectories=8", "eval.samples=2",
    "groups.conditions=2", "groups.size=4", "data.clips.val_fraction=0", "train.iterations=4",
    "train.checkpoint_every=3",
    "window.kind=fixed", "ode.reuse=velocity", "ode.reuse_share=0.01", "ode.audit_every=5",
)  # fmt: skip
BOUND = "ode.audit_margin=1000"


def test_a_bad_audit_leaves_its_row_its_reason_and_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in iteration 1, which the next start refuses too; with another bound it goes on."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    for _ in range(2):
        assert main(["train", *SETTINGS, BOUND, "--resume", "auto"]) == 1
        said = capsys.readouterr().err
        assert "iteration 1: the approximate tail does not keep" in said and "--allow-config-change" in said
        rows = read_jsonl(folder / "metrics.jsonl")
        assert [row["iteration"] for row in rows] == [0, 1]
        assert rows[1]["fidelity/bad"] >= 1 and "policy/loss" not in rows[1] and "policy/loss" in rows[0]
        stop = json.loads((folder / "stopped.json").read_text())
        assert (stop["iteration"], stop["repeats"]) == (1, True) and stop["reason"] in said
        # Between the checkpoints that the settings ask for: nothing that was done is lost.
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    record = read_run(folder)
    assert RunState.of(record).done == 1
    page = report_page(record, samples=0)
    assert "It refused to go on." in page and "the approximate tail does not keep" in page
    assert (
        "stops the same way" in page
        and "--allow-config-change" in page
        and "troubleshooting.md#an-audit-is-bad" in page
    )
    changed = [*SETTINGS, "ode.audit_action=report", "--resume", "auto"]
    assert main(["train", *changed]) == 2
    assert main(["train", *changed, "--allow-config-change"]) == 0
    assert not (folder / "stopped.json").exists() and RunState.of(read_run(folder)).done == 4
    assert [row["iteration"] for row in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_stop_file_that_is_none_is_named(tmp_path: Path) -> None:
    from geoalign.errors import DataError

    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "stopped.json").write_text('{"iteration": 1}')
    with pytest.raises(DataError, match=r"stopped.json: reason: Field required; delete it"):
        read_run(tmp_path)
