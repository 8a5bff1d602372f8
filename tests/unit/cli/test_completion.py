"""The completion scripts, in the shells that read them: somebody types, presses a key, and the command gets words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shells import EVERY, TAB, typed

from geoalign.cli import completion
from geoalign.cli.main import VERBS, main
from geoalign.config.source import preset_names
from geoalign.geometry.presets import PRESETS

SHELLS = [
    pytest.param(shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed"))
    for shell in completion.SHELLS
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as after the demo: with folders that are named like verbs, and with a clip."""
    (tmp_path / "data").mkdir()
    for name in ("clip.mp4", "my film.mp4", "mine.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def complete(shell: str, folder: Path, *lines: str) -> list[list[str]]:
    script = folder / f"geoalign.{shell}"
    script.write_text(completion.script(shell))
    return typed(shell, script, "geoalign", [f"geoalign {line}" for line in lines])


@pytest.mark.parametrize("shell", SHELLS)
def test_one_key_completes_verbs_options_choices_presets_settings_and_files(shell: str, folder: Path) -> None:
    wanted = {
        f"da{TAB}check": ["data", "check"],  # and not the folder data/
        f"data check --con{TAB}ti{TAB}": ["data", "check", "--config", "tiny_cpu"],
        f"train --config mi{TAB}": ["train", "--config", "mine.yaml"],
        f"train --config=ti{TAB}": ["train", "--config=tiny_cpu"],
        f"train --config tiny_cpu optim.we{TAB}0": ["train", "--config", "tiny_cpu", "optim.weight_decay=0"],
        f"train optim.lr=1 --resu{TAB}": ["train", "optim.lr=1", "--resume"],
        f"train data.root=cl{TAB}": ["train", "data.root=clip.mp4"],  # a value: a file, and no setting
        f"export --format l{TAB}": ["export", "--format", "lora"],
        f"sample --video cl{TAB}": ["sample", "--video", "clip.mp4"],
        f"sample --video my{TAB}": ["sample", "--video", "my film.mp4"],
        f"sample --trajectory pan_r{TAB}": ["sample", "--trajectory", "pan_right"],
        f"sample --seed {TAB}1": ["sample", "--seed", "1"],
        f"completion z{TAB}": ["completion", "zsh"],
    }
    assert dict(zip(wanted, complete(shell, folder, *wanted), strict=True)) == wanted


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_option_preset_and_setting_is_offered(shell: str, folder: Path) -> None:
    found = {words: parser for words, parser in completion.parsers() if words}
    lines = [f"{' '.join(words)} -{EVERY}" for words in found]
    asked = (
        EVERY, f"doctor --config {EVERY}", f"score --trajectory {EVERY}", f"train flow.{EVERY}", f"data {EVERY}"
    )  # fmt: skip
    verbs, presets, paths, flow, data, *offered = complete(shell, folder, *asked, *lines)
    assert set(verbs) == {verb.name for verb in VERBS} == {words[0] for words in found}
    assert {"data", *preset_names()} <= {name.rstrip("/") for name in presets}
    assert set(PRESETS) <= set(paths) and {"check", "trajectories", "subset"} <= set(data)
    settings = {name for name in completion.settings() if name.startswith("flow.")}
    assert {word.rstrip() for word in flow} == {"train", *settings}
    for (words, parser), got in zip(found.items(), offered, strict=True):
        options = {option for action in parser._actions for option in action.option_strings}
        assert set(got) == {*words, *options}, words


def test_the_verb_prints_a_script_of_either_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == completion.script(shell)
    assert completion.script("zsh").startswith("#compdef geoalign\n")
