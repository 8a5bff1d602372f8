"""Real processes over gloo: engines and layouts equal one process; signals, dead and hung ranks end all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from geoalign.files.atomic import read_jsonl
from geoalign.policy.open import open_policy
from geoalign.training.checkpoint import list_checkpoints

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def train(launch: Launch) -> Launch:
    def start(folder: Path, processes: int, *settings: str) -> subprocess.Popen[str]:
        command = ("-m", "geoalign", "train", "--config", "smoke", f"run.dir={folder}", *settings)
        return launch(processes, *command, folder=folder.parent)

    return start


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def rank_1_of(process: subprocess.Popen[str]) -> int:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return int(children.split()[-1])


CHECKS = [
    "ok ddp", "ok deepspeed 1", "ok deepspeed 2", "ok fsdp", "ok ulysses", "ok ddp bf16", "ok fsdp kl",
    "ok paper ddp bf16", "ok paper fsdp", "ok paper fsdp bf16", "ok paper fsdp compiled", "ok paper deepspeed ulysses",
]  # fmt: skip


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.dist(groups=1)), pytest.param("cuda", marks=pytest.mark.multigpu)]
)
def test_every_engine_and_layout_equals_one_process(device: str, launch: Launch, tmp_path: Path) -> None:
    checks = str(Path(__file__).with_name("rank_checks.py"))
    process = launch(2, checks, "--device", device, folder=tmp_path)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("ok ")] == CHECKS


@pytest.mark.dist(groups=3)
def test_a_run_of_two_processes_equals_that_of_one(train: Launch, tmp_path: Path) -> None:
    rows, held_out = {}, {}
    for name, processes, settings in (("1", 1, ()), ("2", 2, ()), ("fsdp", 2, ("parallel.engine=fsdp",))):
        process = train(tmp_path / name, processes, *settings)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        assert output.count("held-out, mean over noise seeds") == output.count("report: ") == 1
        rows[name] = read_jsonl(tmp_path / name / "metrics.jsonl")
        held_out[name] = json.loads((tmp_path / name / "summary.json").read_text())["held_out"]["mean"]["after"]
        policy = open_policy(tmp_path / name / "policy.safetensors")
        assert not any(parameter.isnan().any() for parameter in policy.model.parameters())
    for name in ("2", "fsdp"):
        assert len(rows[name]) == len(rows["1"]) == 2
        # The tracker amplifies float32 rounding of other batch shapes; the engines are compared without it above.
        for key in ("policy/grad_norm", "reward/trans", "reward/rot"):
            assert rows[name][0][key] == pytest.approx(rows["1"][0][key], rel=2e-2, abs=1e-3), (name, key)
        assert rows[name][0]["parity/log_prob_diff_max"] == 0.0
        assert held_out[name]["translation_error_m"] == pytest.approx(held_out["1"]["translation_error_m"], rel=2e-2)


@pytest.mark.dist(groups=2)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_run_which_another_number_of_ranks_resumes(
    engine: str, train: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = train(folder, 2, "train.iterations=4000", "train.rank_timeout_s=20", f"parallel.engine={engine}")
    wait_for(folder / "checkpoints" / "step_000002", process)
    os.kill(rank_1_of(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 0 of 2: another rank died or hangs" in output and "--resume auto" in output
    assert "geoalign/training/" not in output  # no traceback but torchrun's own
    done = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step_"))
    settings = ("--resume", "auto", "--allow-config-change", f"train.iterations={done + 1}")
    output, _ = (alone := train(folder, 1, *settings)).communicate(timeout=300)
    assert alone.returncode == 0, output[-3000:]
    assert [row["iteration"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(done + 1))


@pytest.mark.dist(groups=1)
def test_a_hung_rank_ends_the_run_with_a_message(train: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(folder, 2, "train.iterations=4000", "train.rank_timeout_s=5")
    wait_for(folder / "checkpoints" / "step_000001", process)
    hung = rank_1_of(process)
    os.kill(hung, signal.SIGSTOP)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "another rank died or hangs" in line:
            break
    os.kill(hung, signal.SIGKILL)  # torchrun would do so after half a minute
    process.communicate(timeout=60)
    assert process.returncode != 0 and "rank 0 of 2: another rank died or hangs" in output, output[-3000:]


@pytest.mark.dist(groups=1)
@pytest.mark.parametrize(
    "delay", [0.0, pytest.param(0.05, marks=pytest.mark.slow), 0.3, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_a_stop_signal_to_every_process_of_a_job_is_one(delay: float, train: Launch, tmp_path: Path) -> None:
    """A scheduler signals torchrun and its workers; torchrun passes on to them what they already have, when it can."""
    folder = tmp_path / "run"
    process = train(folder, 2, "train.iterations=4000", "train.checkpoint_every=1000")
    wait_for(folder / "metrics.jsonl", process)
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    for worker in listing.split():
        os.kill(int(worker), signal.SIGTERM)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    rows, found = read_jsonl(folder / "metrics.jsonl"), list_checkpoints(folder / "checkpoints")
    assert [path.name for path in found] == [f"step_{len(rows):06d}"], output[-3000:]
    assert f"stopped after iteration {len(rows)} of 4000; continue with --resume auto" in output
    assert process.returncode != 0 and "geoalign/training/" not in output
