"""One form for what verbs share: configuration, results, JSON, sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from geoalign.cli import main as cli
from geoalign.cli.options import four_numbers, frame_size
from geoalign.errors import UsageError
from geoalign.evaluators.table import EVALUATORS, NEEDS_PLANE, WITH_WEIGHTS


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser, sub-verbs too."""

    def below(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            yield name, parser
        for group in groups:
            for word, inner in group.choices.items():
                yield from below(f"{name} {word}".strip(), inner)

    for verb in cli.VERBS:
        yield from below("", cli.parser_of(verb))


COMMANDS = dict(parsers())
CONFIGURED = (
    *("train", "pretrain", "evaluate", "prepare", "budget", "world render", "data check", "data trajectories"),
    *("config print", "config check", "config diff", "benchmark run", "fidelity run", "fidelity choose"),
)
OPTIONALLY_CONFIGURED = ("doctor", "path draw")
OF_A_FOLDER = ("benchmark table", "benchmark report")  # the settings lie in it; some may be given anew


def actions(command: str) -> dict[str, argparse.Action]:
    """Destination -> action of a command's options and words."""
    return {action.dest: action for action in COMMANDS[command]._actions}


def test_a_configuration_is_given_in_one_way() -> None:
    assert {name for name in COMMANDS if "overrides" in actions(name)} == {
        *CONFIGURED,
        *OPTIONALLY_CONFIGURED,
        *OF_A_FOLDER,
    }
    for name in (*CONFIGURED, *OPTIONALLY_CONFIGURED):
        found = actions(name)
        assert found["config"].option_strings == ["--config"], name
        assert found["config"].required == (name in CONFIGURED), name
        assert found["config"].metavar == "NAME|FILE" and found["overrides"].metavar == "section.key=value", name


def test_results_go_to_out_and_numbers_to_json() -> None:
    spelled = {option for name in COMMANDS for action in actions(name).values() for option in action.option_strings}
    assert not spelled & {"--output", "--write", "--policy-out"}
    for name in COMMANDS:
        if "json" in actions(name):
            assert actions(name)["json"].metavar == "FILE", name


@pytest.mark.parametrize("command", ["budget --config smoke", "doctor", "model manifest"])
def test_json_goes_to_a_file_beside_the_text_or_alone_to_stdout(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*command.split(), "--json", "-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main([*command.split(), "--json", str(tmp_path / "numbers.json")]) == 0
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written.keys() == alone.keys() and not capsys.readouterr().out.lstrip().startswith("{")


def test_a_configuration_as_a_bare_word_is_told_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["budget", "paper_64xa800"])
    assert "required: --config" in capsys.readouterr().err


def test_sizes_and_four_numbers() -> None:
    assert frame_size("480x832") == frame_size("480X832") == (480, 832)
    for text, said in (("480", "HEIGHTxWIDTH"), ("4x5x6", "HEIGHTxWIDTH"), ("15x16", "at least 16"), ("axb", "HEIGHT")):
        with pytest.raises(UsageError, match=said):
            frame_size(text)
    assert four_numbers("--intrinsics")("0,1.5,-2,3") == (0.0, 1.5, -2.0, 3.0)
    for text in ("1,2,3", "1,2,3,4,5", "a,b,c,d"):
        with pytest.raises(UsageError, match="four numbers"):
            four_numbers("--intrinsics")(text)


def test_the_table_of_evaluators_is_of_evaluators() -> None:
    assert {*NEEDS_PLANE, *WITH_WEIGHTS} == set(EVALUATORS)
