"""Real processes over gloo: engines and layouts equal one process; signals, dead and hung ranks end all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import HANG_S, LONG_S, PATIENCE_S
from safetensors.torch import load_file

from geoalign.files.atomic import read_jsonl
from geoalign.training.checkpoint import list_checkpoints

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def train(launch: Launch) -> Launch:
    def start(folder: Path, processes: int, *settings: str) -> subprocess.Popen[str]:
        command = ("-m", "geoalign", "train", "--config", "smoke", f"run.dir={folder}", *settings)
        return launch(processes, *command, folder=folder.parent)

    return start


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def rank_1_of(process: subprocess.Popen[str]) -> int:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return int(children.split()[-1])


CHECKS = [
    "ddp", "deepspeed 1", "deepspeed 2", "fsdp", "ulysses", "ddp bf16", "fsdp kl", "paper ddp bf16", "paper fsdp",
    "paper fsdp bf16", "paper fsdp compiled", "paper deepspeed ulysses",
]  # fmt: skip
ON_GPUS = [
    pytest.param(name, marks=pytest.mark.multigpu(**{"needs": "deepspeed"} if "deepspeed" in name else {}))
    for name in CHECKS
]


@pytest.mark.timeout(LONG_S)
@pytest.mark.dist(groups=1)
def test_every_engine_and_layout_equals_one_process(launch: Launch, tmp_path: Path) -> None:
    assert checked(launch, tmp_path, "cpu") == CHECKS


@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("name", ON_GPUS)
def test_an_engine_or_layout_on_nccl_equals_one_process(name: str, launch: Launch, tmp_path: Path) -> None:
    """One group of processes each: an engine that is absent or wrong costs its own row of `make multigpu`."""
    assert checked(launch, tmp_path, "cuda", name) == [name]


def checked(launch: Launch, folder: Path, device: str, *names: str) -> list[str]:
    """What two ranks found equal, of the named checks or all."""
    checks = str(Path(__file__).with_name("rank_checks.py"))
    process = launch(2, checks, "--device", device, *names, folder=folder)
    output, _ = process.communicate(timeout=LONG_S - PATIENCE_S)  # many runs, one after the other
    assert process.returncode == 0, output
    return [line.partition(":")[0].removeprefix("ok ") for line in output.splitlines() if line.startswith("ok ")]


def results(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The held-out numbers of a run and the tensors of its policy."""
    held_out = json.loads((folder / "summary.json").read_text())["held_out_per_noise_seed"]
    return held_out, load_file(folder / "policy.safetensors")


@pytest.mark.dist(groups=4)
def test_a_run_is_the_same_on_any_number_of_ranks(train: Launch, tmp_path: Path) -> None:
    """One, two and four ranks compute alike, in units of one group: not one bit differs. FSDP sums in its own order."""
    runs = {
        "1": (1, "run.ranks=1"), "2": (1, "run.ranks=2"), "4": (1, "run.ranks=4"),
        "fsdp": (2, "parallel.engine=fsdp"),
    }  # fmt: skip
    for name, (processes, setting) in runs.items():
        process = train(tmp_path / name, processes, "groups.conditions=4", "train.iterations=3", setting)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output[-3000:]
        assert output.count("held-out, mean over noise seeds") == output.count("report: ") == 1
    rows = {name: read_jsonl(tmp_path / name / "metrics.jsonl") for name in runs}
    (held_out, policy), columns = results(tmp_path / "1"), ("policy/", "reward/", "advantage/", "parity/", "failures/")
    for name in ("2", "4"):
        other, others = results(tmp_path / name)
        assert other == held_out
        assert policy.keys() == others.keys() and all(torch.equal(policy[key], others[key]) for key in policy), name
        for mine, theirs in zip(rows["1"], rows[name], strict=True):
            assert {key: mine[key] for key in mine if key.startswith(columns)}.items() <= theirs.items(), name
    for key in ("policy/grad_norm", "reward/trans", "reward/rot"):
        # Before any update the ranks differ from one process by rounding, which the tracker amplifies.
        assert rows["fsdp"][0][key] == pytest.approx(rows["1"][0][key], rel=2e-2, abs=1e-3), key
    assert rows["fsdp"][0]["parity/log_prob_diff_max"] == 0.0
    assert not any(tensor.isnan().any() for tensor in results(tmp_path / "fsdp")[1].values())


@pytest.mark.dist(groups=2)
@pytest.mark.parametrize(("processes", "setting"), [(1, "run.ranks=2"), (2, "parallel.engine=fsdp")])
def test_a_killed_rank_ends_the_run_which_another_number_of_ranks_resumes(
    processes: int, setting: str, train: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = train(folder, processes, "train.iterations=4000", f"train.rank_timeout_s={PATIENCE_S}", setting)
    wait_for(folder / "checkpoints" / "step_000002", process)
    os.kill(rank_1_of(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_S)
    if processes == 1:
        assert process.returncode == 1 and output.count("error:") == 1, output[-3000:]
        assert "error: rank 1 of 2 was ended by SIGKILL" in output and "--resume auto" in output
    else:
        assert process.returncode != 0
        told = "rank 0 of 2: another rank died or hangs" in output and "--resume auto" in output
        assert told, output[-3000:]
    assert "geoalign/training/" not in output  # no traceback but torchrun's own
    done = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step_"))
    settings = ("--resume", "auto", "--allow-config-change", f"train.iterations={done + 1}")
    output, _ = (alone := train(folder, 1, *settings)).communicate(timeout=PATIENCE_S)
    assert alone.returncode == 0, output[-3000:]
    assert [row["iteration"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(done + 1))


@pytest.mark.dist(groups=1)
def test_a_hung_rank_ends_the_run_with_a_message(train: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = (f"train.rank_timeout_s={HANG_S}", "eval.samples=2")  # one rank waits while the other evaluates two videos
    process = train(folder, 1, "run.ranks=2", "train.iterations=4000", *limit)
    wait_for(folder / "checkpoints" / "step_000001", process)
    hung = rank_1_of(process)
    os.kill(hung, signal.SIGSTOP)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and output.count("error:") == 1, output[-3000:]
    assert "rank 0 of 2: another rank died or hangs" in output and not Path(f"/proc/{hung}").exists()


@pytest.mark.dist(groups=1)
def test_a_stop_signal_ends_all_ranks_of_a_run_with_their_checkpoint(train: Launch, tmp_path: Path) -> None:
    """To the command, and then again and to a rank too, as a scheduler does: exit code 75, one message, no orphan."""
    folder = tmp_path / "run"
    process = train(folder, 1, "run.ranks=2", "train.iterations=4000", "train.checkpoint_every=1000")
    wait_for(folder / "metrics.jsonl", process)
    rank = rank_1_of(process)
    process.send_signal(signal.SIGTERM)
    os.kill(rank, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    rows, found = read_jsonl(folder / "metrics.jsonl"), list_checkpoints(folder / "checkpoints")
    assert [path.name for path in found] == [f"step_{len(rows):06d}"], output[-3000:]
    assert process.returncode == 75
    assert output.count("SIGTERM: stopping after this iteration") == 1
    assert output.count(f"stopped after iteration {len(rows)} of 4000; continue with --resume auto") == 1
    assert not Path(f"/proc/{rank}").exists()


@pytest.mark.dist(groups=1)
@pytest.mark.parametrize("delay", [0.0, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.05, 0.3, 2.0))])
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
    output, _ = process.communicate(timeout=PATIENCE_S)
    rows, found = read_jsonl(folder / "metrics.jsonl"), list_checkpoints(folder / "checkpoints")
    assert [path.name for path in found] == [f"step_{len(rows):06d}"], output[-3000:]
    assert f"stopped after iteration {len(rows)} of 4000; continue with --resume auto" in output
    assert process.returncode != 0 and "geoalign/training/" not in output
