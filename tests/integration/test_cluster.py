"""The scripts of examples/cluster: a killed node and a signal lead back into the queue, and the run goes on.

Slurm is stood in for by five small scripts; two nodes are two sets of processes of this machine.
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
import torch
from patience import PATIENCE_S
from repository import ROOT
from safetensors.torch import load_file

from geoalign.cli.main import main
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
            bash "$@" &
            echo $! > "$STATE/script.pid"
            wait $!
            code=$?
            [ -e "$STATE/requeued" ] || exit $code
        done
        exit 99
    """,
    "squeue": 'case "$*" in *%L*) cat $STATE/left ;; *) cat $STATE/state ;; esac',
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
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "left").write_text("1-01:30:00\n")
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
    "--config", "smoke", "data.root=data", "world.clips=6", "world.trajectories=8", "eval.samples=2",
    "groups.conditions=2", "groups.size=4", "data.clips.val_fraction=0", "train.iterations=12",
    "train.checkpoint_every=3", f"train.rank_timeout_s={PATIENCE_S}",
)  # fmt: skip


@pytest.mark.dist(groups=1)
def test_a_killed_node_and_a_signal_lead_back_to_what_an_undisturbed_run_gives(
    slurm: dict[str, str], launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a node dies, in the second start the job gets SIGTERM, the third is done; one process is the truth."""
    monkeypatch.chdir(tmp_path)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    queue = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    settings = (*SETTINGS, "run.dir=run")
    job = launch(1, "-c", queue, "sbatch", str(CLUSTER / "train.slurm"), *settings, folder=tmp_path)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE_S

    def wait_for(rows: int) -> None:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= rows):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    wait_for(4)  # one more than the checkpoint holds
    for process in tree_of(int((tmp_path / "node1.pid").read_text())):
        os.kill(process, signal.SIGKILL)
    first = int((tmp_path / "script.pid").read_text())
    while (script := int((tmp_path / "script.pid").read_text() or first)) == first:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    wait_for(len(read_jsonl(metrics)) + 1)
    os.kill(script, signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output[-4000:]
    assert "another rank died or hangs" in output and output.count("back into the queue") == 2, output[-4000:]
    assert output.index("(failed); back into the queue") < output.index("ended with 75 (stopped by a signal)")
    for name in ("SLURM_JOB_ID", "STATE"):
        monkeypatch.delenv(name)
    assert main(["train", *SETTINGS, "run.dir=alone"]) == 0
    found, expected = (read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("run", "alone"))
    assert [row["iteration"] for row in found] == list(range(12))
    keys = [key for key in expected[0] if key.startswith(("iteration", "reward/", "policy/", "advantage/", "parity/"))]
    assert [[row[key] for key in keys] for row in found] == [[row[key] for key in keys] for row in expected]
    policies = [load_file(tmp_path / run / "policy.safetensors") for run in ("run", "alone")]
    assert policies[0].keys() == policies[1].keys()
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("run", "alone")]
    assert summaries[0]["held_out"] == summaries[1]["held_out"] and summaries[0]["iterations"] == 12


RANKS = """
import signal, subprocess, sys, time
assert sys.argv[1] == "-m" and sys.argv[2].endswith("distributed.run")
assert sys.argv[-4:] == ["--config", "x", "--resume", "auto"]
signal.signal(signal.SIGTERM, lambda *_: print("torchrun got it", flush=True))
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
rank += "print('up', flush=True); time.sleep(3600)"
sys.exit(subprocess.run([sys.executable, "-c", rank]).returncode and 1)
"""
NO_RANKS = """
import time
print("up", flush=True)
time.sleep(3600)
"""
FAILING = "import pathlib; {}; raise SystemExit(1)"
CHECKPOINT = "pathlib.Path('run/checkpoints/step_000007').mkdir(parents=True, exist_ok=True)"


@pytest.fixture
def stub(slurm: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """``stub(code)``: an environment whose Python is that code for torchrun; `geoalign doctor` ends as told."""

    def build(code: str, doctor: int = 0, **variables: str) -> dict[str, str]:
        (tmp_path / "torchrun.py").write_text(code)
        python = tmp_path / "bin" / "python-stub"
        python.write_text(
            "#!/bin/bash\n"
            'case "$*" in\n'
            f'*geoalign\\ doctor*) echo \'{{"folder": "run"}}\' > "${{@: -1}}"; exit {doctor} ;;\n'
            f'-c*) exec {sys.executable} "$@" ;;\n'
            "esac\n"
            f'exec {sys.executable} {tmp_path / "torchrun.py"} "$@"\n'
        )
        python.chmod(0o755)
        return slurm | {"PYTHON": str(python)} | variables

    return build


def start(environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", CLUSTER / "train.slurm", "--config", "x"],
        env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("code", [RANKS, NO_RANKS], ids=["ranks", "before there are any"])
def test_a_signal_stops_the_ranks_and_requeues(code: str, stub: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Of torchrun only the exit code is kept: it turns the ranks' 75 into 1, and must not get the signal while it has
    ranks."""
    environment = stub(code)
    job = start(environment, tmp_path)
    assert job.stdout is not None
    seen = ""
    while seen.count("up") < 2:
        line = job.stdout.readline()
        assert line, seen
        seen += line
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert "ended with 75 (stopped by a signal); back into the queue" in output and "torchrun got it" not in output
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def ended(environment: dict[str, str], folder: Path) -> tuple[int, str, bool]:
    """Exit code and output of a start, and whether it asked for another."""
    (folder / "requeued").unlink(missing_ok=True)
    job = start(environment, folder)
    output, _ = job.communicate(timeout=PATIENCE_S)
    return job.returncode, output, (folder / "requeued").exists()


def test_it_gives_up_after_failures_without_a_new_checkpoint(
    stub: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """However often it was stopped before: two in a row are the most here, and a checkpoint in between begins anew."""
    for restarts, done in enumerate(("0", CHECKPOINT, "0", "0")):
        environment = stub(FAILING.format(done), MOST_FAILURES="2", SLURM_RESTART_COUNT=str(20 * restarts))
        code, output, again = ended(environment, tmp_path)
        assert again == (restarts < 3), output
    assert code == 1 and not again and "2 times in a row without a new checkpoint; not started again" in output


STOPPED = """
import json, pathlib
folder = pathlib.Path("run")
folder.mkdir(exist_ok=True)
(folder / "stopped.json").write_text(json.dumps({"iteration": 3, "reason": "a bad audit", "repeats": REPEATS}))
raise SystemExit(1)
"""


def test_what_would_stop_the_same_way_does_not_come_back(stub: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Unlike what may pass by, and unlike the reason of an earlier start."""
    code, output, again = ended(stub(STOPPED.replace("REPEATS", "False")), tmp_path)
    assert code == 0 and again and "back into the queue" in output
    code, output, again = ended(stub(STOPPED.replace("REPEATS", "True")), tmp_path)
    assert code == 1 and not again and "would stop the same way: a bad audit" in output
    os.utime(tmp_path / "run" / "stopped.json", (0, 0))
    code, output, again = ended(stub(FAILING.format("0")), tmp_path)
    assert again and "same way" not in output


@pytest.mark.parametrize("code", [1, 2])
def test_what_cannot_start_does_not_come_back(code: int, stub: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    assert ended(stub("raise AssertionError", doctor=code), tmp_path) == (code, "", False)


SLOW = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("goes on", flush=True))
print("up", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("again", [True, False], ids=["once", "too often"])
def test_an_iteration_that_does_not_fit_is_given_up_before_the_limit_ends_the_job(
    again: bool, stub: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """At the limit Slurm ends the job for good, so it must be back in the queue before. Three seconds more are left
    than what is kept, in Slurm's form of days and hours."""
    kept = 24 * 3600 + 3600 + 60
    (tmp_path / "left").write_text("1-01:01:03\n")
    environment = stub(SLOW, LEAST_LEFT_S=str(kept), MOST_FAILURES="5" if again else "1")
    job = start(environment, tmp_path)
    try:
        assert job.stdout is not None
        seen = ""
        while seen.count("up") < 2:
            seen += (line := job.stdout.readline())
            assert line, seen
        job.send_signal(signal.SIGTERM)
        while "does not fit the time limit" not in seen:
            seen += (line := job.stdout.readline())
            assert line, seen
        assert ("back into the queue" in seen) == again and ("ask for more time" in seen) != again
        deadline = time.monotonic() + PATIENCE_S
        while again and not (tmp_path / "requeued").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / "requeued").exists() == again and job.poll() is None
    finally:
        for process in tree_of(job.pid):
            os.kill(process, signal.SIGKILL)
        job.communicate(timeout=PATIENCE_S)


def test_a_cancelled_job_is_not_put_back(stub: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "state").write_text("COMPLETING\n")
    code, output, again = ended(stub(FAILING.format("0")), tmp_path)
    assert code == 1 and not again and "the job is COMPLETING" in output
