"""Every name that an iteration writes is explained in docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.policy.files import new_policy
from geoalign.rewards.registry import build_rewards
from geoalign.training.trainer import Trainer
from geoalign.types import RetakeBatch
from geoalign.world.pairs import paired_videos

GLOSSARY = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_every_metric_is_in_the_glossary() -> None:
    config = load_config(Config, "smoke")
    world = config.world
    assert world is not None

    class Conditions:
        def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
            return paired_videos(world, 2, torch.Generator().manual_seed(0), style="real").batch.select(group_ids)

    policy = new_policy(config.model, config.codec, seed=0)
    names = Trainer(config, policy, Conditions(), build_rewards(config.rewards)).step()
    rows = [line.split("|")[1] for line in GLOSSARY.read_text().splitlines() if line.startswith("| `")]
    written = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    patterns = [re.sub(r"<\w+>", ".+", re.sub(r"([.])", r"\\.", name)) for name in written]
    missing = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not missing
