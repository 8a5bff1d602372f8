"""The demo, as a user runs it: the held-out camera error really falls, and the folder it leaves is complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import LONG_S, PATIENCE_S
from seams import seam_ratio

from geoalign.files.atomic import read_jsonl
from geoalign.jobs.evaluate import AXIS_METRICS
from geoalign.policy.open import describe, open_policy

pytestmark = pytest.mark.timeout(LONG_S)  # the whole demo runs inside the first of them
ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "geoalign", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def geoalign(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One full demo run, another seed than the committed study."""
    folder = tmp_path_factory.mktemp("demo")
    done = geoalign("train", "--config", "tiny_cpu", "run.seed=5", "run.ranks=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    return folder / "runs" / "tiny_cpu"


def test_held_out_error_falls(demo: Path) -> None:
    """Bounds of the product's promise with room for seed and machine: -25 %, +5 % (or 0.1 degree), +0.4 dB.

    The committed study (docs/learning.md) has -30 % or better on every seed; the room is its spread over noise seeds.
    """
    summary = json.loads((demo / "summary.json").read_text())
    for kind in ("presets", "random"):
        before, after = (summary["held_out"][kind][stage] for stage in ("before", "after"))
        assert after["translation_error_m"] <= 0.75 * before["translation_error_m"], kind
        assert after["rotation_error_deg"] <= max(
            1.05 * before["rotation_error_deg"], before["rotation_error_deg"] + 0.1
        )
        assert after["psnr_db"] >= before["psnr_db"] + 0.4
        assert after["second_translation_error_m"] <= 0.8 * before["second_translation_error_m"]
        planted = [name for name in AXIS_METRICS if abs(before[name] - 1) >= 0.15]
        assert len(planted) == 4 and all(abs(after[name] - 1) < abs(before[name] - 1) for name in planted), kind


def test_the_run_folder_is_complete(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["seed"] == 5 and summary["wall_s"] > 0 and summary["cpu_s"] > 0
    assert summary["versions"]["torch"] and summary["commit"]
    rows = read_jsonl(demo / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(40))
    assert all(row["parity/log_prob_diff_max"] == 0.0 for row in rows)
    assert [row["window/start"] for row in rows[:6]] == [0, 1, 2, 0, 1, 2]
    # M (k + 1) prefix and first window forwards, M G tail forwards; the learner runs once per condition (merged).
    for row in rows[:3]:
        start = int(row["window/start"])
        assert row["perf/forwards_rollout"] == 8 * (start + 1) + 8 * 16 * (6 - start - 1)
        assert row["perf/forwards_learner"] == 8
    names = {path.name for path in demo.iterdir()}
    assert {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "tb",
        "checkpoints",
        "eval",
        "policy.safetensors",
        "report.html",
    } <= names
    assert len(list((demo / "checkpoints").glob("step_*"))) == 2
    assert (demo / "report.html").stat().st_size < 20e6


def test_shipped_base_is_what_it_says() -> None:
    """Small, without patch seams, and its notes name the command and the held-out numbers."""
    import torch

    from geoalign.config.load import load_config
    from geoalign.config.schema import Config
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.report.held_out import present_names

    path = ROOT / "geoalign" / "_assets" / "tiny_base.safetensors"
    assert path.stat().st_size < 3e6
    policy, notes = open_policy("builtin:tiny_base"), describe("builtin:tiny_base").notes
    assert notes["command"] and notes["seed"] == 11 and notes["pretrain"]["bias_growth"] == [0.4, 0.8]
    config = load_config(Config, "tiny_cpu")
    result = evaluate(policy, config, HeldOut.build(config))
    for kind, video in result.videos.items():
        assert seam_ratio(video[:, 1:], config.codec.patch) <= 1.15, kind
        for metric, values in present_names(notes["held_out"][kind]).items():
            # Another CPU rounds differently: pictures differ in the last bits, errors by far less than 2 %.
            assert torch.allclose(
                torch.tensor(result.numbers[kind][metric]), torch.tensor(values), rtol=0.02, atol=0.01
            )


def test_a_short_pretraining_writes_a_policy(tmp_path: Path) -> None:
    done = geoalign("pretrain", "--config", "smoke", "--out", "base.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    policy, notes = open_policy(tmp_path / "base.safetensors"), describe(tmp_path / "base.safetensors").notes
    assert notes["pretrain"]["steps"] == 20 and policy.codec.latent_channels == 81
    done = geoalign("evaluate", "--config", "smoke", "--model", "base.safetensors", "--json", "e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["held_out"] == notes["held_out"]


def test_ctrl_c_leaves_a_checkpoint_that_continues(tmp_path: Path) -> None:
    arguments = ("train", "--config", "smoke", "train.iterations=30")
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "smoke" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "--resume auto" in errors, errors
    rows = len(read_jsonl(metrics))
    assert 2 <= rows < 30
    done = geoalign(*arguments[:-1], f"train.iterations={30}", "--resume", "auto", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    again = geoalign(*arguments, cwd=tmp_path)
    assert again.returncode == 2 and "--resume auto" in again.stderr  # never silently overwritten


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "--config", "tiny_cpuu"), 2, "tiny_cpu"),
        (("train", "--config", "smoke", "groups.sise=3"), 2, "size"),
        (("train", "--config", "smoke", "train.base=nowhere.safetensors"), 1, "nowhere.safetensors"),
        (("train", "--config", "smoke", "train.base=builtin:other"), 1, "builtin:tiny_base"),
        (("train", "--config", "smoke", "--resume", "latest"), 1, "no checkpoint"),
        (("train", "--config", "smoke", "run.device=cuda"), 2, "geoalign doctor"),
    ],
)
def test_wrong_requests_say_what_to_do(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = geoalign(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
