"""Two real processes over gloo give the run of one process; a stop signal and a dead rank end all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geoalign.io_utils import read_jsonl

ROOT = Path(__file__).parents[2]


def start(folder: Path, processes: int, *settings: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "geoalign",
        "train",
        "--config",
        "smoke",
        f"run.dir={folder}",
        *settings,
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path: Path) -> None:
    rows = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        process = start(folder, processes)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        rows.append(read_jsonl(folder / "metrics.jsonl"))
    assert len(rows[0]) == len(rows[1]) == 2
    # Batches of other shapes round differently in float32, which scorer and advantages amplify.
    for name in ("policy/grad_norm", "reward/trans", "reward/rot"):
        assert rows[1][0][name] == pytest.approx(rows[0][0][name], rel=2e-2, abs=1e-3), name
    assert rows[1][0]["parity/log_prob_diff_max"] == 0.0
    assert (tmp_path / "2" / "summary.json").exists()


@pytest.mark.dist
def test_a_killed_rank_ends_the_run_which_then_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, 2, "train.iterations=40", "train.rank_timeout_s=20")
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step_000002").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    from geoalign.training.checkpoint import list_checkpoints

    assert list_checkpoints(folder / "checkpoints")
