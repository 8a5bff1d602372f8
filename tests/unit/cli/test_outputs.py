"""A result that cannot be written is refused before the work and never ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoalign.cli.main import main
from geoalign.cli.train import print_comparison
from geoalign.errors import DataError, RunError, UsageError
from geoalign.files.atomic import atomic_path, atomic_write_text, check_writable
from geoalign.jobs.evaluate import Evaluation, HeldOut


@pytest.mark.parametrize(
    ("verb", "option", "work"),
    [
        ("pretrain --config smoke", "--out", "geoalign.jobs.pretrain.pretrain"),
        ("evaluate --config smoke --model builtin:tiny_base", "--json", "geoalign.jobs.evaluate.evaluate"),
        ("budget --config smoke", "--json", "geoalign.cli.budget.climb"),
        ("config docs", "--out", "geoalign.config.docs.reference_page"),
        ("report {run}", "--out", "geoalign.report.page.report_page"),
        ("export --format redirector --model {run}", "--out", "geoalign.policy.open.describe"),
    ],
    ids=lambda value: value.split()[0],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    verb: str,
    option: str,
    work: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("worked before the check"))
    command = verb.format(run=tmp_path).split()
    suffix = "html" if command[0] == "report" else "safetensors"
    assert main([*command, option, str(tmp_path / "file" / f"result.{suffix}")]) == 1
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert len([line for line in message.splitlines() if not line.endswith(f" {command[0]}: loading")]) == 1
    (tmp_path / f"folder.{suffix}").mkdir()
    assert main([*command, option, str(tmp_path / f"folder.{suffix}")]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_policy_is_written_as_what_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "smoke", "--out", str(tmp_path / "policy.pt")]) == 2
    assert "name a .safetensors file" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Evaluation({"presets": {"psnr_db": [float("nan"), 20.0]}}, {}, {})
    monkeypatch.setattr("geoalign.jobs.evaluate.evaluate", lambda *_, **__: found)
    monkeypatch.setattr("geoalign.jobs.evaluate.HeldOut.build", lambda *_: HeldOut({}))
    command = ["evaluate", "--config", "smoke", "--model", "builtin:tiny_base", "--json", str(tmp_path / "e.json")]
    assert main(command) == 0
    assert json.loads((tmp_path / "e.json").read_text())["held_out"] == {"presets": {"psnr_db": [None, 20.0]}}
    assert "nan" in capsys.readouterr().out


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "result.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        check_writable(tmp_path / "file" / "a" / "result.json")


def test_a_failed_write_is_one_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    atomic_write_text(target, "old")
    with (
        pytest.raises(RunError, match=r"result\.json: cannot be written \(No space left on device\)"),
        atomic_path(target),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), atomic_path(target):
        raise ZeroDivisionError
    with pytest.raises(RunError, match="cannot be written"):
        atomic_write_text(target / "below.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"] and target.read_text() == "old"


def test_a_run_on_real_clips_prints_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"mean": {"before": {"translation_error_m": 0.4}, "after": {"translation_error_m": 0.3}}}
    for held_out, lines in (({}, 0), (numbers, 3)):  # an empty line, the head, a row
        print_comparison({"held_out": held_out})
        assert capsys.readouterr().out.count("\n") == lines
