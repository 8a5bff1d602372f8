"""The scripts of examples/cluster: a killed node and a signal lead back into the queue, and the run goes on.

Slurm is stood in for by four small scripts; two nodes are two sets of processes of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE_S
from repository import ROOT

from geoalign.files.atomic import read_jsonl

CLUSTER = ROOT / "examples" / "cluster"
STAND_INS = {
    # Every node runs the command; a signal goes to all, an error of one ends all.
    "srun": """
        shift
        . "$GEOALIGN_CLUSTER/finish.sh"
        trap 'kill -TERM $nodes 2>/dev/null' TERM
        for node in 0 1; do SLURM_NODEID=$node "$@" & nodes="${nodes:-} $!"; echo $! > "$STATE/node$node.pid"; done
        worst=0
        for node in $nodes; do
            finish $node
            code=$?
            [ $code -gt $worst ] && worst=$code
        done
        exit $worst
    """,
    "scontrol": """
        case $1 in
        show) echo 127.0.0.1 ;;
        requeue) echo "$2" >> "$STATE/requeued" ;;
        esac
    """,
    # The queue: a job that asks for it is started again, as often as it asks.
    "sbatch": """
        for SLURM_RESTART_COUNT in 0 1 2; do
            export SLURM_RESTART_COUNT
            rm -f "$STATE/requeued"
            bash "$@"
            code=$?
            [ -e "$STATE/requeued" ] || exit $code
        done
        exit 99
    """,
    "nvidia-smi": "echo GPU 0",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job with two nodes of one process each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "STATE": str(tmp_path), "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "local",
        "GEOALIGN_CLUSTER": str(CLUSTER), "GEOALIGN_COMPILER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def tree_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in table.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


SETTINGS = (
    "--config", "smoke", "run.dir=run", "data.root=data", "world.clips=6", "world.trajectories=8", "eval.samples=2",
    "groups.conditions=2", "groups.size=4", "data.clips.val_fraction=0", "train.iterations=8",
    "train.checkpoint_every=3", "train.rank_timeout_s=600",
)  # fmt: skip


@pytest.mark.dist(groups=1)
def test_a_killed_node_is_requeued_and_what_was_lost_is_done_again_alike(
    slurm: dict[str, str], launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    queue = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    job = launch(1, "-c", queue, "sbatch", str(CLUSTER / "train.slurm"), *SETTINGS, folder=tmp_path)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):  # one more than the checkpoint holds
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    before = read_jsonl(metrics)
    for process in tree_of(int((tmp_path / "node1.pid").read_text())):
        os.kill(process, signal.SIGKILL)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output[-4000:]
    assert "back into the queue" in output and "another rank died or hangs" in output
    after = read_jsonl(metrics)
    assert [row["iteration"] for row in after] == list(range(8))
    # The fourth iteration was run before the kill and again after it, from the checkpoint of the third.
    assert len(before) < 8
    keys = [key for key in before[3] if key.startswith(("iteration", "reward/", "policy/", "advantage/", "parity/"))]
    assert [before[3][key] for key in keys] == [after[3][key] for key in keys]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 8


RANKS = """
import signal, subprocess, sys, time
assert sys.argv[1] == "-m" and sys.argv[2].endswith("distributed.run")
assert sys.argv[-4:] == ["--config", "x", "--resume", "auto"]
signal.signal(signal.SIGTERM, lambda *_: print("torchrun got it", flush=True))
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
rank += "print('up', flush=True); time.sleep(600)"
sys.exit(subprocess.run([sys.executable, "-c", rank]).returncode and 1)
"""


def test_a_signal_stops_the_ranks_and_requeues(slurm: dict[str, str], tmp_path: Path) -> None:
    """Of torchrun only the exit code is kept: it turns the ranks' 75 into 1, and must not get the signal itself."""
    python = tmp_path / "bin" / "python-stub"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {tmp_path / "ranks.py"} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = slurm | {"PYTHON": str(python)}
    job = subprocess.Popen(
        ["bash", CLUSTER / "train.slurm", "--config", "x"],
        env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert job.stdout is not None
    seen = ""
    while seen.count("up") < 2:
        seen += job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert "ended with 75 (stopped by a signal); back into the queue" in output and "torchrun got it" not in output
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def test_after_many_restarts_it_gives_up(slurm: dict[str, str], tmp_path: Path) -> None:
    environment = slurm | {"PYTHON": "false", "SLURM_RESTART_COUNT": "20"}
    command = ["bash", CLUSTER / "train.slurm", "--config", "x"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and "not started again" in done.stderr
    assert not (tmp_path / "requeued").exists()
