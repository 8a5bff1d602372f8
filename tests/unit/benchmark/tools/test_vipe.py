"""ViPE through a stand-in that writes its files: what it finds, and every way to fail as a counted, named failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_tools
import numpy as np
import pytest

from geoalign.benchmark.records import CaseFiles
from geoalign.benchmark.tools.settings import RUNNERS

FRAMES, SIZE = 5, 32
Build = Callable[..., Any]


def measured(tool: Any, case_files: CaseFiles, out: Path) -> Any:
    """The result; what was wanted of the folder holds after every call."""
    result = tool.measure(case_files, out)
    assert (result.status == "ok") == (result.cause == "") and "\n" not in result.cause
    assert not (out / ".work").exists()
    if result.status == "failed":
        assert result.poses is None and not result.metrics
    return result


def test_the_camera_is_read(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    foreign_tools.vipe(environments)
    vipe = tool("vipe")
    assert (vipe.name, vipe.metrics, vipe.gives_poses) == ("vipe", (), True) and "Apache-2.0" in vipe.licence
    result = measured(vipe, case_files, tmp_path / "out")
    assert result.status == "ok", result.cause
    found = np.load(result.poses)
    expected = np.tile(np.eye(4), (FRAMES, 1, 1))
    expected[:, 0, 3] = 2.0 / SIZE * np.arange(FRAMES)
    np.testing.assert_allclose(found["c2w"], expected, rtol=0, atol=1e-12)  # powers of two, then a projection to SO(3)
    assert found["frames"].tolist() == list(range(FRAMES)) and found["c2w"].dtype == np.float64
    np.testing.assert_allclose(found["intrinsics"], np.tile([1, 1, 0.5, 0.5], (FRAMES, 1)), rtol=0)


def test_failures_are_named(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    """What may pass is tried again; a camera that was not found is not found again, for ViPE's seeds are fixed."""
    failures = {
        "raise": ("raised: RuntimeError: vipe infer ended with exit code 1; it printed: .*CUDA out of memory", 2),
        "lost": ("incomplete output: the camera of 4 of 5 frames", 2),
        "identity": ("identity poses: all 5 poses are equal", 1),
        "half": ("raised: BadZipFile", 1),
        "nan": ("incomplete output: poses.npz: frame 1: NaN or infinite pose", 1),
    }
    foreign_tools.vipe(environments)
    vipe = tool("vipe")
    for behaviour, (cause, tries) in failures.items():
        foreign_tools.behave(environments, "vipe", behaviour)
        result = measured(vipe, case_files, tmp_path / behaviour)
        assert re.match(cause, result.cause) and len(result.cause) < 1000, result.cause
        assert foreign_tools.cases(environments, "vipe") == [behaviour] * tries
        assert "Reading video stream" in (tmp_path / behaviour / "failure.log").read_text()
        if behaviour == "identity":  # enough of trying again
            vipe._worker.settings = vipe._worker.settings.model_copy(update={"retries": 0})
    foreign_tools.behave(environments, "vipe", "well")  # the next case meets a sound worker
    assert measured(vipe, case_files, tmp_path / "next").status == "ok"
    assert vipe._worker.starts == 1


def test_what_passes_is_no_failure(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    foreign_tools.vipe(environments)
    foreign_tools.behave(environments, "vipe", "once")
    assert measured(tool("vipe"), case_files, tmp_path / "out").status == "ok"
    assert foreign_tools.cases(environments, "vipe") == ["once", "well"]


def test_a_hanging_tool_is_killed_with_its_children(
    environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = foreign_tools.vipe(environments)
    vipe = tool("vipe")
    vipe._worker.start()
    foreign_tools.behave(environments, "vipe", "hang")

    left = tmp_path / "out" / ".work" / "left"
    left.parent.mkdir(parents=True)
    left.write_text("by a kill")
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Timer", foreign_tools.impatient_timer(folder))
        result = measured(vipe, case_files, tmp_path / "out")
    assert result.cause.startswith("timed out: no answer within 1800 s, killed; it printed: ")
    assert foreign_tools.cases(environments, "vipe") == ["hang"]  # the time is gone: not tried again
    assert gone(int((folder / "hung").read_text()))
    foreign_tools.behave(environments, "vipe", "well")
    assert measured(vipe, case_files, tmp_path / "out").status == "ok"


def test_a_killed_run_leaves_no_tool_behind(environments: Path, case_files: CaseFiles, tmp_path: Path) -> None:
    """The host ends itself and what it started when its parent is gone, however that ended."""
    folder = foreign_tools.vipe(environments)
    foreign_tools.behave(environments, "vipe", "hang")
    setup = {
        "runner": str(RUNNERS / "run_vipe.py"), "distribution": "nvidia-vipe", "files": [],
        "options": {"pipeline": "default", "size": None, "dense": False},
    }  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    request = {"do": "measure", "retake_video": str(case_files.retake_video), "frames": FRAMES, "folder": str(work)}
    code = (
        "import os, subprocess, sys, time\n"
        "host = subprocess.Popen(sys.argv[1:4], stdin=subprocess.PIPE, start_new_session=True)\n"
        "host.stdin.write((sys.argv[4] + chr(10)).encode())\nhost.stdin.flush()\ntime.sleep(600)"
    )
    command = [str(folder / "bin" / "python"), str(RUNNERS / "host.py"), json.dumps(setup), json.dumps(request)]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    parent = subprocess.Popen([sys.executable, "-S", "-c", code, *command], env={**os.environ, "PATH": path})
    child = folder / "child"
    while not child.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(int(child.read_text()))


def gone(process: int) -> bool:
    """Whether a process ends, is a zombie at most, before the test's own limit."""
    while True:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)


def test_a_wrong_environment_is_named(environments: Path, case_files: CaseFiles, tool: Build, tmp_path: Path) -> None:
    """Before anything is run, and at no cost for the next case."""
    vipe = tool("vipe")
    result = measured(vipe, case_files, tmp_path / "out")
    assert result.cause.startswith(f"absent: no {environments}/vipe/bin/python; `geoalign doctor`")
    foreign_tools.vipe(environments, "2.0.1")
    result = measured(vipe, case_files, tmp_path / "out")
    assert result.cause == "wrong version: nvidia-vipe 2.0.1 in the environment vipe, not nvidia-vipe 1.1 or 1.2"
    foreign_tools.remove(environments, "vipe")
    folder = foreign_tools.vipe(environments)
    (folder / "site" / "vipe" / "_configs" / "pipeline" / "only_pose.yaml").unlink()
    result = measured(vipe, case_files, tmp_path / "out")
    assert result.cause == "wrong version: nvidia-vipe 1.2.0 lacks vipe/_configs/pipeline/only_pose.yaml"
    assert foreign_tools.cases(environments, "vipe") == []
    (folder / "bin" / "vipe").unlink()
    (folder / "site" / "vipe" / "_configs" / "pipeline" / "only_pose.yaml").touch()
    for _ in range(2):
        cause = measured(vipe, case_files, tmp_path / "out").cause
        assert cause == "raised: FileNotFoundError: no program vipe in PATH"
    starts = vipe._worker.starts
    result = measured(vipe, case_files, tmp_path / "out")  # loading may take minutes: broken is broken
    assert result.cause.startswith("raised: not tried again after 4 starts") and vipe._worker.starts == starts
    (folder / "bin" / "python").write_text("not a program")
    assert measured(tool("vipe"), case_files, tmp_path / "out").cause.startswith("absent: ")
