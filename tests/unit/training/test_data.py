"""The loop draws ahead, reports what the data did and refuses to resume on other data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from torch import Tensor

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.data.frames import to_uint8
from geoalign.data.source import RetakeDataset
from geoalign.errors import CheckpointError
from geoalign.files.checkpoints import CHANGED
from geoalign.jobs.train_resume import on_its_data
from geoalign.policy.files import new_policy
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.registry import build_rewards
from geoalign.training.checkpoint import TrainState
from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.trainer import Trainer
from geoalign.types import RetakeBatch
from geoalign.world.dataset import write_world

GLOSSARY = ROOT / "docs" / "metrics.md"


class Plain:
    """The same conditions without working ahead."""

    def __init__(self, dataset: RetakeDataset) -> None:
        self.dataset = dataset

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        return self.dataset.batch(iteration, group_ids)


class Watched:
    """The same reward; keeps the cameras that it read."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.keys = reward, reward.name, reward.keys
        self.cameras: list[Tensor | None] = []

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        output = self.reward(videos, batch)
        self.cameras.append(output.cameras)
        return output


def test_drawing_ahead_changes_nothing_and_its_counters_are_explained(tmp_path: Path) -> None:
    config = load_config(
        Config,
        "smoke",
        ["world.clips=10", "world.trajectories=16", f"data.root={tmp_path}", "train.iterations=2"],
    )
    assert config.world is not None
    write_world(config.data, config.world)
    results = []
    for ahead in (True, False):
        dataset = RetakeDataset(config.data, seed=1)
        source = dataset if ahead else Plain(dataset)
        rewards = build_rewards(config.rewards)
        rewards["geometry"] = Watched(rewards["geometry"])
        trainer = Trainer(config, new_policy(config.model, config.codec, 0), source, rewards)
        trainer.film_wanted = ahead  # a film changes no number either
        first = trainer.step()
        assert (trainer.film is not None) == ahead
        if trainer.film is not None:
            wanted = dataset.batch(0, [0])
            assert np.array_equal(trainer.film.source, to_uint8(wanted.source.video[0]).numpy())
            assert np.array_equal(trainer.film.target_c2w, wanted.target_camera.c2w[0].float().numpy())
            first_read = trainer.rewards["geometry"].cameras[0][0]
            assert np.array_equal(trainer.film.read_c2w, trainer.film.target_c2w[0] @ first_read.numpy(), True)
        assert list(dataset._pending) == ([(1, (0, 1))] if ahead else [])
        second = trainer.step()
        assert not dataset._pending, "nothing is drawn beyond the last iteration"
        results.append((first, second))
    for with_counters, without in zip(*results, strict=True):
        for name, value in without.items():
            if not name.startswith(("time/", "perf/")):
                assert with_counters[name] == value or value != value, name
    counters = [name for name in results[0][1] if name.startswith("data/")]
    assert {"data/wait_s", "data/decoded_windows", "data/bad_clips", "data/paths_drawn"} <= set(counters)
    listed = re.findall(r"`(data/[^`]+)`", GLOSSARY.read_text())
    patterns = [re.sub(r"<\w+>", r"\\w+", name) for name in listed]
    assert not [name for name in counters if not any(re.fullmatch(pattern, name) for pattern in patterns)]


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    overrides = ["world.clips=10", "world.trajectories=16"]
    fingerprints = []
    for seed in (1, 1, 2):
        root = tmp_path / str(len(fingerprints))
        config = load_config(Config, "smoke", [*overrides, f"world.seed={seed}", f"data.root={root}"])
        assert config.world is not None
        write_world(config.data, config.world)
        fingerprints.append(RetakeDataset(config.data, seed=0).fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]  # a moved folder is the same data
    nothing = Snapshot({}, {}, {})
    state = TrainState(7, nothing, {"data": fingerprints[0]})
    older = TrainState(7, nothing, {})  # says nothing
    assert on_its_data(state, fingerprints[1], False) is state and on_its_data(older, fingerprints[2], False) is older
    (noted,) = on_its_data(state, fingerprints[2], True).notes[CHANGED]
    assert noted["iteration"] == 7 and f"{fingerprints[0][:12]} -> {fingerprints[2][:12]}" in noted["what"]
    with pytest.raises(CheckpointError, match=r"the data changed since iteration 7 .*--allow-config-change"):
        on_its_data(state, fingerprints[2], False)
