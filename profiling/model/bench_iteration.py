"""Time one RL iteration with the exact levers off and on, and compare its network passes with the cost model.

python profiling/model/bench_iteration.py --config bench_levers --levers off,exact --json FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.files.atomic import atomic_write_json
from geoalign.jobs.environment import describe_environment
from geoalign.policy.open import open_policy
from geoalign.rewards.registry import build_rewards
from geoalign.training.trainer import Trainer
from geoalign.types import RetakeBatch
from geoalign.world.pairs import paired_videos

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"share_prefix": False, "merge_first_step": False, "prune_source": False, "streaming": "off"},
    "exact": {"share_prefix": True, "merge_first_step": True, "prune_source": True, "streaming": "graphs"},
}


class _Conditions:
    """Rendered pairs, so that no file is read inside the timed iteration."""

    def __init__(self, config: Config) -> None:
        assert config.world is not None, "the benchmark runs on the embedded world"
        pairs = paired_videos(config.world, config.groups.conditions, torch.Generator().manual_seed(0), style="real")
        self._batch = pairs.batch

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        """The same conditions in every iteration."""
        return self._batch.select(group_ids)


def trainer_of(config: Config, setting: str) -> Trainer:
    """A fresh trainer with the levers of ``setting``."""
    levers = config.levers.model_copy(update=SETTINGS[setting])
    config = Config.model_validate(config.model_copy(update={"levers": levers}).model_dump())
    assert config.train.base is not None, "train.base is not set"
    policy = open_policy(config.train.base)
    return Trainer(config, policy, _Conditions(config), build_rewards(config.rewards))


def measure(config: Config, settings: list[str], repeats: int) -> list[dict[str, Any]]:
    """Rows of the result file; settings take turns, so that a slow minute of the machine hits all alike."""
    trainers = {setting: trainer_of(config, setting) for setting in settings}
    for trainer in trainers.values():
        trainer.step()
    seconds: dict[str, list[float]] = {setting: [] for setting in settings}
    phases: dict[str, list[dict[str, float]]] = {setting: [] for setting in settings}
    metrics: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for setting, trainer in trainers.items():
            began = time.perf_counter()
            metrics[setting] = trainer.step()
            seconds[setting].append(time.perf_counter() - began)
            times = {k: v for k, v in metrics[setting].items() if k.startswith("time/")}
            times.pop("time/between_s")  # the other setting's turn
            phases[setting].append(times)
    return [
        {
            "levers": setting,
            "switches": SETTINGS[setting] | {"recompute": config.levers.recompute},
            "seconds_median": float(np.median(seconds[setting])),
            "seconds_p20": float(np.percentile(seconds[setting], 20)),
            "seconds_p80": float(np.percentile(seconds[setting], 80)),
            "repeats": repeats,
            "forward_equivalents": metrics[setting]["perf/forward_equivalents"],
            "predicted_forward_equivalents": metrics[setting]["perf/predicted_forward_equivalents"],
            "phases": {k: float(np.median([row[k] for row in phases[setting]])) for k in phases[setting][0]},
        }
        for setting in settings
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="bench_levers", help="preset or file")
    parser.add_argument("--levers", default="off,exact", help=f"comma-separated: {', '.join(SETTINGS)}")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations per setting, after one warm-up")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    arguments = parser.parse_args()
    settings = arguments.levers.split(",")
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        parser.error(f"--levers: {', '.join(unknown)} unknown; choose from {', '.join(SETTINGS)}")
    config = load_config(Config, arguments.config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    rows = measure(config, settings, arguments.repeats)
    window, flow = config.window, config.flow
    shape = {"steps": flow.steps, "window": window.size, "start": window.start, "group": config.groups.size}
    result = {"config": arguments.config, **shape, "settings": rows, "environment": describe_environment()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(arguments.json, result)
    for row in rows:
        print(
            f"{row['levers']:>6}: {row['seconds_median']:.2f} s, {row['forward_equivalents']:.0f} forward equivalents"
        )


if __name__ == "__main__":
    main()
