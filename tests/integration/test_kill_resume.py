"""SIGKILL in the middle of rollout, reward, update and checkpoint writing: what was written resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import Conditions, smoke

from geoalign.policy.files import new_policy
from geoalign.rewards.registry import build_rewards
from geoalign.training import checkpoint as checkpoints
from geoalign.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
# What is patched, its function, and the call that kills: each lies inside the second iteration or its checkpoint.
PLACES = {
    "rollout": ("geoalign.policy.policy.RetakePolicy", "fast_velocity", 12),
    "reward": ("geoalign.training.trainer", "decode_and_score", 2),
    "update": ("geoalign.training.learner", "clipped_surrogate", 3),
    "checkpoint": ("geoalign.training.checkpoint", "save_sealed", 5),
}


def trainer_of() -> Trainer:
    config = smoke()
    policy = new_policy(config.model, config.codec, seed=3)
    return Trainer(config, policy, Conditions(config), build_rewards(config.rewards))


def train(folder: Path, iterations: int) -> list[float]:
    """Continue from the newest checkpoint; gradient norm of every iteration run here."""
    trainer, norms = trainer_of(), []
    found = checkpoints.list_checkpoints(folder)
    if found:
        trainer.load(checkpoints.load_checkpoint(found[-1], config=checkpoints.RunSettings("x", {})))
    while trainer.iteration < iterations:
        norms.append(trainer.step()["policy/grad_norm"])
        checkpoints.save_checkpoint(folder, trainer.state(), config=checkpoints.RunSettings("x", {}), keep=2)
    return norms


def kill_at(place: str) -> None:
    """Make the chosen call of this process its last."""
    import pkgutil

    owner, name, number = PLACES[place]
    target = pkgutil.resolve_name(owner)
    original, calls = getattr(target, name), []

    def fatal(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, fatal)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(tmp_path_factory.mktemp("straight"), 3)


@pytest.mark.parametrize("place", list(PLACES))
def test_resumed_run_equals_the_uninterrupted_one(place: str, uninterrupted: list[float], tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests/support"))
    done = subprocess.run(
        [sys.executable, __file__, place, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    complete = checkpoints.list_checkpoints(tmp_path)
    assert [folder.name for folder in complete] == ["step_000001"]
    meta = json.loads((complete[0] / "state.json").read_text())
    assert meta["iteration"] == 1
    assert train(tmp_path, 3) == uninterrupted[1:]
    assert not list(tmp_path.glob(".geoalign-*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at(sys.argv[1])
    train(Path(sys.argv[2]), 3)
