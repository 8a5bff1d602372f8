"""The edges of resume: older and damaged checkpoints, changed settings, other held-out conditions, a second process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from geoalign.cli.main import main
from geoalign.files.atomic import read_jsonl
from geoalign.files.checkpoints import CHANGED
from geoalign.files.locks import writer_lock

ITERATIONS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept the checkpoint of every iteration; the world lies beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert main(arguments(folder)) == 0
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "train", "--config", "smoke", f"run.dir={folder}", "data.root=data", "world.clips=6",
        "world.trajectories=8", "groups.conditions=2", "groups.size=4", "eval.samples=2", "data.clips.val_fraction=0",
        f"train.iterations={ITERATIONS}", "train.keep_checkpoints=9", *more,
    ]  # fmt: skip


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal_runs(run: Path, finished: Path) -> None:
    """Bit for bit: policy, newest checkpoint and what every iteration measured; nothing twice, nothing missing."""
    newest = f"checkpoints/step_{ITERATIONS:06d}"
    for file in (
        "policy.safetensors",
        *(f"{newest}/{part}.safetensors" for part in ("trained", "average", "optimizer")),
    ):
        expected, found = load_file(finished / file), load_file(run / file)
        assert expected.keys() == found.keys() and all(found[name].equal(expected[name]) for name in expected), file
    rows, expected_rows = (read_jsonl(folder / "metrics.jsonl") for folder in (run, finished))
    keys = [key for key in expected_rows[0] if key.startswith(("iteration", "reward/", "policy/"))]
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in expected_rows]


def test_newer_checkpoints_and_results_are_set_aside_and_never_taken_by_auto(
    run: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments(run, "--resume", str(run / "checkpoints" / "step_000001"))) == 0
    assert names(run) == [
        "step_000001", "step_000002", "step_000002.aside-1", "step_000003", "step_000003.aside-1"
    ]  # fmt: skip
    assert "step_000003: newer than iteration 1, set aside as step_000003.aside-1" in caplog.text
    for name in ("summary.json", "policy.safetensors", "eval/after.npz"):  # eval/before.npz is of this run too
        assert (run / name).exists() and (run / f"{name}.aside-1").exists()
    assert not (run / "eval" / "before.npz.aside-1").exists()
    assert json.loads((run / "env.json").read_text())["processes"] == {"count": 1, "nodes": 1, "torchrun": False}
    assert_equal_runs(run, finished)
    shutil.rmtree(run / "checkpoints" / "step_000003")
    shutil.rmtree(run / "checkpoints" / "step_000002")
    caplog.clear()
    assert main(arguments(run, "--resume", "auto")) == 0  # from 1, not from what lies aside
    assert_equal_runs(run, finished)
    # What lies aside can be taken up again by its name.
    assert main(arguments(run, "--resume", str(run / "checkpoints" / "step_000002.aside-1"))) == 0
    assert_equal_runs(run, finished)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "tensors cut": lambda path: (path / "trained.safetensors").write_bytes(
        (path / "trained.safetensors").read_bytes()[:1000]
    ),
    "state empty": lambda path: (path / "state.json").write_text(""),
    "state without its counter": lambda path: (path / "state.json").write_text('{"format": 1, "config": "x"}'),
    "optimizer gone": lambda path: (path / "optimizer.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_auto_steps_back_to_the_newest_whole_checkpoint_and_says_so(
    damage: str, run: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](run / "checkpoints" / "step_000003")
    assert main(arguments(run, "--resume", "auto")) == 0
    assert re.search(r"step_000003(: not a readable checkpoint|/state.json: no usable iteration)", caplog.text)
    assert "stepping back to" in caplog.text
    assert "step_000003.aside-1" in names(run)
    assert_equal_runs(run, finished)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("")
    before = names(run)
    assert main(arguments(run, "--resume", "auto")) == 1
    assert "not a readable checkpoint" in capsys.readouterr().err and names(run) == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lr=0.01", "optim.lr 0.0001 -> 0.01"),
        ("run.seed=3", "run.seed 0 -> 3"),
        ("eval.samples=3", "eval.samples 2 -> 3"),
        ("eval.seed=1", "eval.seed 777 -> 1"),
        ("eval.noise_seeds=[5]", "eval.noise_seeds [11] -> [5]"),
    ],
)
def test_a_changed_setting_is_refused_by_its_key(
    setting: str, words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    assert main(arguments(run, setting, "--resume", "auto")) == 2
    assert f"({words})" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()) == before


def test_a_setting_that_changed_leaves_a_trace(run: Path) -> None:
    """In the checkpoints, the summary and the report; of the part that was made before, a resume tells nothing."""
    second = run / "checkpoints" / "step_000002"
    assert main(arguments(run, "--resume", str(second))) == 0
    assert not any(CHANGED in json.loads((run / name).read_text()) for name in ("env.json", "summary.json"))
    assert main(arguments(run, "optim.lr=0.01", "--resume", str(second), "--allow-config-change")) == 0
    expected = [{"iteration": 2, "what": "optim.lr 0.0001 -> 0.01"}]
    assert [json.loads((run / name).read_text())[CHANGED] for name in ("env.json", "summary.json")] == [expected] * 2
    newest = run / "checkpoints" / "step_000003"
    assert json.loads((newest / "state.json").read_text())["notes"][CHANGED] == expected
    assert main(arguments(run, "optim.lr=0.02", "--resume", str(newest), "--allow-config-change")) == 0
    again = json.loads((run / "summary.json").read_text())[CHANGED]
    assert again == [*expected, {"iteration": 3, "what": "optim.lr 0.01 -> 0.02"}]


def test_other_held_out_conditions_are_refused_whatever_is_allowed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(run, "eval.samples=3", "--resume", "auto", "--allow-config-change")) == 2
    assert "held-out conditions changed since the run began (eval.samples 2 -> 3)" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_loads(run: Path, finished: Path) -> None:
    """Its state names neither settings nor held-out conditions, and carries no checksums."""
    shutil.rmtree(run / "checkpoints" / "step_000003")
    path = run / "checkpoints" / "step_000002" / "state.json"
    state = json.loads(path.read_text())
    del state["notes"]["conditions"]
    path.write_text(json.dumps({name: state[name] for name in ("format", "iteration", "config", "notes")}))
    assert main(arguments(run, "--resume", "latest")) == 0
    assert_equal_runs(run, finished)


def test_a_second_process_is_refused_and_disturbs_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writer_lock(run, "run"):
        before = sorted(run.rglob("*"))
        assert main(arguments(run, "--resume", "auto")) == 2
        assert "another process writes this run (host " in capsys.readouterr().err
        assert sorted(run.rglob("*")) == before
