"""`make results`: pages are what the result files say; finished runs are skipped, stale and missing ones are made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from patience import LONG_S

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("studies")


def test_the_pages_are_generated_from_the_committed_result_files() -> None:
    import record
    import results

    marked = {path.relative_to(ROOT) for path in ROOT.glob("docs/*.md") if record.BEGIN in path.read_text("utf-8")}
    assert marked == set(results.PAGES)
    drifted = [str(page) for page, text in results.PAGES.items() if record.generated(ROOT / page) != text(ROOT)]
    assert drifted == [], "run `make results` and commit the pages"


def test_every_run_has_a_file_and_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    import record
    import results

    runs = results.runs(record.WHOLE, tmp_path)
    assert len({run.result for run in runs}) == len({record.fingerprint(run.settings) for run in runs}) == len(runs)
    assert [run.name for run in runs if not (ROOT / run.result).exists()] == []
    committed = {path.name for path in (ROOT / "docs" / "results" / "learning").glob("*.json")}
    assert committed == {run.result.name for run in runs if run.result.parent.name == "learning"}  # and no others


def test_a_result_is_stale_when_what_it_was_made_with_has_changed(tmp_path: Path) -> None:
    import learning
    import record

    path, (study, *_) = tmp_path / "a.json", learning.STUDIES
    made_with = learning.settings(study, "tiny_cpu")
    assert record.state(path, made_with) == "missing"
    record.write_result(path, {"value": float("nan")}, made_with)
    assert json.loads(path.read_text())["value"] is None  # as JSON can say it
    assert record.state(path, made_with) == "finished"
    other = learning.Study(study.name, study.base, (*study.overrides, "eval.samples=4"))
    for changed in (
        learning.settings(other, "tiny_cpu"),
        learning.settings(study, "smoke"),
        {**made_with, "base": "x"},
    ):
        assert record.state(path, changed) == "stale"
    path.write_text("{}")  # made before results had fingerprints
    assert record.state(path, made_with) == "stale"


def test_an_interrupted_command_makes_only_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs, of which the second fails at first; the third, which is timed, comes after all others."""
    import record
    import results

    made: list[str] = []

    def run(name: str, **options: bool) -> results.Run:
        def make(path: Path) -> None:
            made.append(name)
            if made == ["a", "b"]:
                raise SystemExit("stopped")
            record.write_result(path, {}, {"name": name})

        return results.Run(name, Path(f"{name}.json"), {"name": name}, make, **options)

    found = [run("timed", alone=True), run("a"), run("b")]
    monkeypatch.setattr(results, "runs", lambda *_: found)
    monkeypatch.setattr(results.learning, "render_world", lambda *_: None)
    monkeypatch.setattr(results, "PAGES", {})
    command = ["results", "--root", str(tmp_path), "--work", str(tmp_path / "work"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="stopped"):
        results.main()
    results.main()
    assert made == ["a", "b", "b", "timed"] and "a: finished" in capsys.readouterr().out
    results.main()
    monkeypatch.setattr(sys, "argv", [*command, "--again", "a"])
    results.main()
    assert made == ["a", "b", "b", "timed", "a"]
    monkeypatch.setattr(sys, "argv", [*command, "--again", "c"])
    with pytest.raises(SystemExit):
        results.main()
    assert "no run is called c; there are timed, a, b" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
def test_the_whole_command_cut_short(tmp_path: Path) -> None:
    """Every run and page, small, in a place of its own; a second call finds nothing to do."""
    command = [sys.executable, str(ROOT / "profiling" / "studies" / "results.py"), "--small"]
    command += ["--root", str(tmp_path / "root"), "--work", str(tmp_path / "work")]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert "missing" in outputs[0] and "stale" not in outputs[0] and "missing" not in outputs[1]
    assert "running" in outputs[0] and "running" not in outputs[1]
    page = (tmp_path / "root" / "docs" / "learning.md").read_text()
    assert "not run" not in page and page != (ROOT / "docs" / "learning.md").read_text()


def test_a_result_names_its_command_as_others_may_run_it() -> None:
    import record

    told = (
        "/home/me/geoalign/__main__.py train run.dir=/tmp/x/run train.base=builtin:tiny_base a/b.json --out /tmp/y.json"
    )
    assert record.portable(told) == "geoalign train run.dir=run train.base=builtin:tiny_base a/b.json --out y.json"
    files = [path for part in ("docs/results", "profiling/results") for path in (ROOT / part).rglob("*.json*")]
    commands = [line for path in files for line in path.read_text().splitlines() if '"command": "' in line]
    assert len(commands) > 15
    assert [line for line in commands if record.portable(line) != line] == []
