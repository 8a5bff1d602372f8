"""How many ranks a run starts, and how it ends of what its ranks did; without starting any."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from patience import PATIENCE_S

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import ConfigError, UsageError
from geoalign.training.processes import cores
from geoalign.training.processes.launcher import Ending, check_environment, how_it_ended, run_ranks


def said(rank: int, text: str, code: int) -> dict[str, object]:
    return {"rank": rank, "text": text, "exit_code": code}


FIRST = said(1, "error: x", 1)
LOST = said(0, "error: rank 0 of 2: another rank died or hangs", 1)
KILLED = Ending("error: rank 1 of 2 was ended by SIGKILL (is memory short?); continue with --resume auto", 1)
CASES = {
    "all done": ([(1, 0), (0, 0)], [], set(), Ending("", 0)),
    "all stopped": ([(0, 75), (1, 75)], [said(0, "stopped", 75)] * 2, {signal.SIGTERM}, Ending("stopped", 75)),
    "all refuse": ([(0, 2), (1, 2)], [said(1, "error: no", 2), said(0, "error: no", 2)], set(), Ending("error: no", 2)),
    "the first that failed is the cause": ([(1, 1), (0, 1)], [FIRST, LOST], set(), Ending("error: x", 1)),
    "killed from outside": ([(1, -9), (0, 1)], [LOST], set(), KILLED),
    "killed here, for it hung": ([(0, 1), (1, None)], [LOST], set(), Ending(LOST["text"], 1)),
    "killed after a stop": ([(1, -9), (0, 75)], [said(0, "stopped", 75)], {signal.SIGTERM}, KILLED),
    "SIGTERM before the loop": ([(0, -15), (1, -15)], [], {signal.SIGTERM}, Ending("", 143, signal.SIGTERM)),
    "Ctrl-C while Python starts": ([(0, -2), (1, 130)], [], {signal.SIGINT}, Ending("interrupted", 130)),
    "without a word": ([(0, 3), (1, 0)], [], set(), Ending("error: rank 0 of 2 failed with exit code 3", 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_as_its_ranks_did(case: str) -> None:
    codes, words, passed_on, expected = CASES[case]
    assert how_it_ended(codes, words, passed_on) == expected


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    code = "from geoalign.training.processes.launcher import *; import time; die_with_launcher(); time.sleep(3600)"
    rank = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert rank.stdin is not None
    rank.stdin.close()  # as the kernel does for a process that is killed
    assert rank.wait(timeout=PATIENCE_S) == -signal.SIGKILL


def test_a_run_removes_what_killed_ones_left_to_their_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "geoalign-ranks-killed").mkdir()
    (tmp_path / "geoalign-ranks-killed" / ".lock").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_ranks(1, ["--version"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables",
    ["WORLD_SIZE=x", "WORLD_SIZE=2", "RANK=3", "RANK=2 WORLD_SIZE=2", "RANK=-1 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=0",
     "RANK= WORLD_SIZE=1", "LOCAL_RANK=1.5", "LOCAL_RANK=4 LOCAL_WORLD_SIZE=4",
     "RANK=\N{SUPERSCRIPT TWO} WORLD_SIZE=4"],
)  # fmt: skip
def test_variables_that_name_no_rank_are_refused(variables: str) -> None:
    with pytest.raises(UsageError, match="no rank of a run"):
        check_environment(dict(word.split("=") for word in variables.split()))


@pytest.mark.parametrize("variables", ["", "RANK=0", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2",
                                       "RANK=9 WORLD_SIZE=16 LOCAL_RANK=1", "WORLD_SIZE=1"])  # fmt: skip
def test_variables_of_launchers_pass(variables: str) -> None:
    check_environment(dict(word.split("=") for word in variables.split()))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores; control groups lie in the folder that is returned."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"membership": "0::/\n", "cpu.max": "max 100000\n"}, 8),
        ({"membership": "0::/\n", "cpu.max": "350000 100000\n"}, 3),  # what a container sees of its own group
        ({"membership": "0::/a/b\n", "a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ({"membership": "0::/\n", "cpu.max": "50000 100000\n"}, 1),
        ({"membership": "4:cpu,x:/d\n", "cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4),
        ({"membership": "4:cpu:/\n2:memory:/\n", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"membership": "0::/\n", "cpu.max": "what\n"}, 8),
    ],
)  # fmt: skip
def test_cores_are_those_that_a_process_may_use(files: dict[str, str], expected: int, machine: Path) -> None:
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["run.ranks=auto"], 8),
        (["run.ranks=auto", "groups.conditions=4"], 4),
        (["run.ranks=auto", "groups.conditions=9"], 3),  # the largest number that deals nine groups equally
        (["run.ranks=auto", "groups.conditions=11"], 1),
        (["run.ranks=auto", "run.device=auto"], 1),
        (["run.ranks=auto", "parallel.sequence=2", "groups.conditions=3"], 6),
        (["run.ranks=2"], 2),
        (["run.ranks=1"], 1),
    ],
)
def test_ranks_are_as_many_as_cores_conditions_and_dealing_allow(
    settings: list[str], expected: int, machine: Path
) -> None:
    assert cores.ranks_of(load_config(Config, "tiny_cpu", settings)) == expected


def test_ranks_that_cannot_be_dealt_to_are_refused_before_they_start(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Config, "tiny_cpu", ["run.ranks=3"])
    with pytest.raises(ConfigError, match="cannot be dealt equally to 3 processes"):
        cores.ranks_of(config)
    monkeypatch.setenv("WORLD_SIZE", "4")  # torchrun's number counts
    assert cores.ranks_of(config) == 4
