"""The shell scripts around Nsight Compute and Nsight Systems: the commands they make, the usage they print."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from profiling_runs import ROOT


def test_profiler_scripts_call_their_tools(tmp_path: Path) -> None:
    for tool in ("ncu", "nsys"):
        (tmp_path / tool).write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        (tmp_path / tool).chmod(0o755)

    def run(*words: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *words], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )

    here, without = f"{tmp_path}:{os.environ['PATH']}", "/usr/bin:/bin"
    words = run("profiling/ncu_op.sh", "captures/a-00000.safetensors", path=here).stdout.split("\n")
    assert "--profile-from-start" in words and words[words.index("--export") + 1] == "a-00000"
    assert words[-6:-1] == [
        str(ROOT / "profiling/replay.py"),
        "captures/a-00000.safetensors",
        "--device",
        "cuda",
        "--profile",
    ]
    words = run(
        "profiling/nsys_step.sh", "report", "30", "9", "--", "train", "--config", "smoke", path=here
    ).stdout.split("\n")
    assert words[words.index("--delay") + 1] == "30" and words[words.index("--duration") + 1] == "9"
    assert words[-6:-1] == ["-m", "geoalign", "train", "--config", "smoke"]
    for name, usage in (("ncu_op.sh", "FILE.safetensors"), ("nsys_step.sh", "REPORT DELAY_S")):
        done = run(f"profiling/{name}", path=here)
        assert done.returncode == 2 and usage in done.stderr
    assert "not on PATH" in run("profiling/ncu_op.sh", "x", path=without).stderr
