"""The command line: lazy verbs, a true table of verbs, one-line errors with exit codes, doctor."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from patience import PATIENCE_S
from repository import ROOT

from geoalign.cli import completion
from geoalign.cli import main as cli
from geoalign.config.layout import GroupShare, deal_groups
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.config.source import preset_names, preset_summary
from geoalign.errors import ConfigError


def geoalign(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, or a piece of Python, in a fresh process."""
    command = ["-c", code] if code else ["-m", "geoalign", *arguments]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, check=False, timeout=PATIENCE_S
    )


def test_help_and_config_print_import_no_torch() -> None:
    code = """
import sys
from geoalign.cli.main import main
assert main(["--help"]) == 0
assert main(["config", "print", "--config", "tiny_cpu"]) == 0
heavy = {"torch", "numpy", "diffusers", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = geoalign(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_every_listed_verb_exists_and_teaches(verb: cli.Verb, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own help begins with what the overview says of it: the table of verbs is the one home of that line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb.name, "--help"])
    assert stopped.value.code == 0
    usage, described = capsys.readouterr().out.split("\n\n")[:2]
    assert usage.startswith(f"usage: geoalign {verb.name}") and described.startswith(verb.summary)
    assert re.search(rf"^  {verb.name} +{re.escape(verb.summary)}$", cli.help_text(), re.MULTILINE)


def test_the_first_line_of_a_verb_is_said_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new verb that says nothing of its start does not begin in silence; one that answers at once says nothing."""
    said = {}
    for verb in (cli.Verb("model", "Use", "new"), cli.Verb("model", "Use", "quick", says_first=False)):
        monkeypatch.setattr(cli, "VERBS", (verb,))
        assert cli.main(["model", "manifest"]) == 0
        said[verb.summary] = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d model: loading\n", said["new"]) and said["quick"] == ""


PARSERS = dict(completion.parsers())


@pytest.mark.parametrize("words", [words for words in PARSERS if words], ids=" ".join)
def test_every_verb_shows_examples_that_parse(words: tuple[str, ...]) -> None:
    text = PARSERS[words].format_help()
    shown = re.split(r"^examples?:$", text, flags=re.MULTILINE)[1].replace("\\\n", " ")
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  geoalign ")]
    assert commands
    for command in commands:  # what follows two blanks is told about it; in a continued line they are its indentation
        plain = re.split(r" {2,}(?![-'\"])| > ", re.sub(r" +(?=--)", " ", command))[0]
        arguments = shlex.split(plain)[1:]
        verb = next(verb for verb in cli.VERBS if verb.name == arguments[0])
        assert callable(cli._parse(cli.parser_of(verb), arguments).run), command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean `geoalign train`?"),
        (["config", "print", "--config", "tiny_cpuu"], "did you mean tiny_cpu?"),
        (["config", "print", "--config", "tiny_cpu", "optim.lrr=1"], "did you mean `optim.lr`?"),
        (["config", "print", "--config", "tiny_cpu", "--sauces"], "unrecognized arguments: --sauces"),
        (
            ["config", "check", "--config", "tiny_cpu", "--world-size", "3"],
            "set groups.conditions=9, or use 2 processes",
        ),
        (
            ["config", "check", "--config", "tiny_cpu", "--world-size", "3", "parallel.sequence=2"],
            "parallel.sequence 2 must divide the 3 processes",
        ),
        (["report", "/nonexistent"], "no run folder at /nonexistent"),
        (["report", "/nonexistent", "--samples", "-2"], "--samples -2"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    assert cli.main(arguments) == 2
    begun = f"{arguments[0]}: loading"  # of a verb that imports much
    lines = [line for line in capsys.readouterr().err.splitlines() if begun not in line]
    assert said in lines[0] and len(lines) == 1
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(Exception, match=r"\w") as raised:
        cli.main(arguments)
    assert said in str(raised.value)


def test_interrupt_exits_130_and_ranks_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    monkeypatch.setenv("RANK", "3")
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "geoalign [rank 3]: interrupted\n"


def test_overrides_are_taken_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "print", "--config", "tiny_cpu", "run.seed=7", "--sources", "run.name=x"]) == 0
    out = capsys.readouterr().out
    assert "# command line (run.seed=7)" in out and "# command line (run.name=x)" in out


def test_diff_shows_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "diff", "--config", "tiny_cpu", "--against", "tiny_cpu"]) == 0
    assert "same settings" in capsys.readouterr().out
    assert cli.main(["config", "diff", "--config", "tiny_cpu"]) == 0
    assert "-> 40" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train.iterations"))


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert "run" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_says_what_it_is_for(name: str) -> None:
    load_config(Config, name)
    assert len(preset_summary(name).split()) > 5  # a sentence, which docs/configuration.md prints


def test_doctor_reports_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "Kernels" in text
    assert cli.main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    words = [line.split()[:2] for line in text.splitlines()]
    assert all([row["op"], row["backend"]] in words for row in report["kernels"]["ops"])  # columns stay apart
    assert report["kernels"]["error"] is None and report["kernels"]["ops"]
    assert report["packages"]["torch"]


@pytest.mark.parametrize(
    ("conditions", "size", "world", "placed"),
    [
        (8, 12, 1, GroupShare(8, 12)),
        (8, 12, 4, GroupShare(2, 12)),
        (8, 12, 8, GroupShare(1, 12)),
        (8, 12, 32, GroupShare(1, 3)),
    ],
)
def test_groups_are_dealt_whole_or_split_evenly(conditions: int, size: int, world: int, placed: GroupShare) -> None:
    assert deal_groups(conditions, size, world) == placed
    assert placed.groups * placed.members * world == conditions * size


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups\.conditions=10, or use 4 processes"):
        deal_groups(8, 12, 5)
