"""Definitions of tools, and what ``geoalign doctor`` says of their environments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import foreign_tools
import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT

from geoalign.benchmark.records import CaseFiles
from geoalign.benchmark.tools.checks import tool_environments
from geoalign.benchmark.tools.load import load_tools
from geoalign.benchmark.tools.settings import RUNNERS, builtin_tools, read_tool
from geoalign.benchmark.tools.worker import Kind, child_environment, last_lines
from geoalign.cli.main import main
from geoalign.config.benchmark import BenchmarkConfig
from geoalign.config.schema import Config
from geoalign.errors import ConfigError


def config(*tools: str) -> Config:
    return Config(benchmark=BenchmarkConfig(tools=tools))


def test_every_built_in_tool_has_its_script_its_licence_and_its_commands() -> None:
    assert builtin_tools() == ("dyn_met3r", "met3r", "vbench", "vipe")
    for tool, name in zip(load_tools(config(*builtin_tools()).benchmark), builtin_tools(), strict=True):
        settings = read_tool(name)[1]
        assert tool.name == name and tool.licence and bool(tool.metrics) != tool.gives_poses
        assert all(worker.runner.parent == RUNNERS for worker in settings.workers.values())
        assert {worker.environment for worker in settings.workers.values()} <= set(settings.environments)
    commands = " ".join(read_tool("vipe")[1].environments["vipe"].commands)
    assert "nvidia-vipe==1.2.0" in commands and "install vipe" not in commands
    # The metrics that our own code gives are those that its definition announces.
    assert load_tools(config("dyn_met3r").benchmark)[0].metrics == read_tool("dyn_met3r")[1].metrics


def test_the_docs_tell_of_every_tool_and_every_kind_of_failure() -> None:
    text = (ROOT / "docs" / "benchmark-tools.md").read_text()
    for name in builtin_tools():
        settings = read_tool(name)[1]
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{worker.environment}`" in row for worker in settings.workers.values())
    for kind in get_args(Kind):
        assert f"\n| `{kind}` |" in text
    assert all(f"`{metric}`" in text for metric in (*read_tool("dyn_met3r")[1].metrics, "met3r"))


def test_runners_import_nothing_of_ours() -> None:
    for worker in (worker for name in builtin_tools() for worker in read_tool(name)[1].workers.values()):
        assert "geoalign" not in "".join(line for line in worker.runner.open() if "import" in line)


def test_a_tool_of_ones_own(tmp_path: Path) -> None:
    """A runner beside its YAML file, in an environment that the file describes."""
    code = "def load(options):\n    return lambda request: {'sharpness': options['gain']}\n"
    (tmp_path / "sharp.py").write_text(code)
    environment = {"python": sys.executable, "distribution": "numpy", "versions": ["2"], "commands": ["true"]}
    worker = {"runner": "sharp.py", "environment": "mine", "options": {"gain": 3}, "timeout_s": PATIENCE_S}
    settings = {
        "licence": "mine", "metrics": ["sharpness"], "workers": {"worker": worker},
        "environments": {"mine": environment},
    }  # fmt: skip
    file = tmp_path / "sharp.yaml"
    file.write_text(json.dumps(settings))
    (tool,) = load_tools(config(str(file)).benchmark)
    case = CaseFiles("a", tmp_path / "s.mp4", tmp_path / "r.mp4", tmp_path / "t.npz", 5)
    result = tool.measure(case, tmp_path / "out")
    assert (result.status, result.metrics) == ("ok", {"sharpness": 3.0}), result.cause
    tool.close()


def test_problems_of_a_definition_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tool is called 'vip'; did you mean .*vipe"):
        read_tool("vip")
    file = tmp_path / "mine.yaml"
    worker = {"runner": "run_vipe.py", "environment": "nowhere", "timeout_s": 1}
    file.write_text(json.dumps({"licence": "x", "workers": {"worker": worker}}))
    with pytest.raises(ConfigError, match=r"mine.yaml: nothing describes the environment 'nowhere'"):
        read_tool(str(file))
    file.write_text(json.dumps({"licence": "x", "workers": {"worker": worker | {"runner": "a.py"}}}))
    with pytest.raises(ConfigError, match=r"no runner a\.py, neither beside it nor among ours"):
        read_tool(str(file))
    file.write_text(json.dumps({"licence": "x", "workers": {"scene": worker}}))
    with pytest.raises(ConfigError, match="kind worker has workers worker, not scene"):
        read_tool(str(file))


def test_the_doctor_tells_which_environments_are_there(environments: Path) -> None:
    """Each once, though ViPE's serves two tools; with the commands that make it where it is not as it must be."""
    names = ("vipe", "dyn_met3r", "vbench")
    found = {check.name: check for check in tool_environments(config(*names))}
    assert list(found) == ["environment vipe", "environment met3r", "environment vbench"]
    assert {check.state for check in found.values()} == {"absent"}
    commands = found["environment vipe"].fix.splitlines()
    assert commands[0] == f"python3 -m venv {environments}/vipe" and "{folder}" not in found["environment vipe"].fix
    for command in commands:  # each is one that a shell can read
        subprocess.run(["sh", "-n", "-c", command], check=True)
    foreign_tools.vipe(environments, "1.2.3")
    foreign_tools.met3r(environments)
    foreign_tools.environment(environments, "vbench", "vbench", "0.1.4", {}, {})
    found = {check.name: check for check in tool_environments(config(*names))}
    assert {name: check.state for name, check in found.items()} == {
        "environment vipe": "present", "environment met3r": "present", "environment vbench": "wrong",
    }  # fmt: skip
    assert "nvidia-vipe 1.2.3" in found["environment vipe"].what and found["environment vipe"].fix == ""
    assert found["environment vbench"].what == "vbench 0.1.4 in the environment vbench, not vbench 0.1.5"
    (bad,) = tool_environments(config("vip"))
    assert bad.state == "wrong" and "did you mean" in bad.what


def test_a_tool_sees_one_device_and_nothing_of_our_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a machine spread over its devices, as workers of rewards do."""
    ours = {"PATH": "/bin", "PYTHONPATH": "/x", "RANK": "9", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "1"}
    python, path = Path("/tools/vipe/bin/python"), {"PATH": "/tools/vipe/bin:/bin"}
    for devices, stated, expected in ((0, None, None), (8, None, "3"), (8, "4,6", "6"), (0, "", "")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        told = ours if stated is None else ours | {"CUDA_VISIBLE_DEVICES": stated}
        seen = {} if expected is None else {"CUDA_VISIBLE_DEVICES": expected}
        assert child_environment(told, python) == path | seen


def test_what_a_tool_printed_is_told_in_short() -> None:
    assert last_lines("a\nb\n\n  30%|##\r 99%|####\r\nCUDA out of memory\n\n") == "99%|#### / CUDA out of memory"
    assert last_lines("") == "" and len(last_lines("x" * 10_000)) == 200


def test_a_missing_tool_keeps_no_run_from_starting(environments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its state and its commands, each on a line of its own, stand below what a run needs."""
    assert main(["doctor", "--config", "smoke", "benchmark.tools=[vipe]"]) == 0
    told = capsys.readouterr().out.splitlines()
    (verdict,) = (line for line in told if line.startswith("Configuration smoke: "))
    assert verdict.endswith("a run can start; what 1 of 1 environments of tools would measure is counted as failed")
    place = next(number for number, line in enumerate(told) if "[ ] environment vipe" in line)
    assert told[place + 1].strip() == f"python3 -m venv {environments}/vipe"
    assert all(line.startswith("        ") for line in told[place + 1 :]) and len(told) == place + 6
