"""The completion scripts: bash is asked as the shell asks it; every verb and option of the parsers is offered."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from geoalign.cli import completion
from geoalign.cli.main import VERBS, main
from geoalign.config.source import preset_names


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "geoalign.bash").write_text(completion.script("bash"))
    (folder / "clip.mp4").touch()
    (folder / "mine.yaml").touch()
    return folder


def complete(folder: Path, *lines: str) -> list[list[str]]:
    """What the shell would offer for the last word of each line."""
    ask = """
        source geoalign.bash
        while IFS= read -r line; do
            IFS='|' read -ra COMP_WORDS <<< "$line"
            [[ $line == *'|' ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            _geoalign
            echo "${COMPREPLY[*]}"
        done
    """
    text = "".join(f"{line.replace(' ', '|')}\n" for line in lines)
    done = subprocess.run(["bash", "-c", ask], cwd=folder, input=text, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.split("\n")[:-1]]


def test_verbs_options_choices_presets_settings_and_files(scripts: Path) -> None:
    offered = complete(
        scripts, "geoalign ", "geoalign data ", "geoalign data check --con", "geoalign train --config ti",
        "geoalign train --config tiny_cpu optim.we", "geoalign train optim.lr=1 --resu", "geoalign export --format l",
        "geoalign completion ", "geoalign sample --video cl", "geoalign train --config mi",
        "geoalign sample --seed ",
    )  # fmt: skip
    assert set(offered[0]) == {verb.name for verb in VERBS}
    assert {"check", "trajectories", "subset"} <= set(offered[1])
    assert offered[2:] == [
        ["--config"], ["tiny_cpu"], ["optim.weight_decay="], ["--resume"], ["lora"], ["-h", "--help", "bash", "zsh"],
        ["clip.mp4"], ["mine.yaml"], [],
    ]  # fmt: skip


def test_every_option_of_every_verb_is_offered(scripts: Path) -> None:
    found = {words: parser for words, parser in completion.parsers() if words}
    assert {words[0] for words in found} == {verb.name for verb in VERBS}
    lines = [f"geoalign {' '.join(words)} " for words in found]
    for (words, parser), offered in zip(found.items(), complete(scripts, *lines), strict=True):
        options = {option for action in parser._actions for option in action.option_strings}
        assert options <= set(offered), words
    assert set(preset_names()) <= set(complete(scripts, "geoalign doctor --config ")[0])


def test_zsh_gets_the_same_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    first, second, rest = capsys.readouterr().out.split("\n", 2)
    assert (first, "bashcompinit" in second, rest) == ("#compdef geoalign", True, completion.script("bash"))
