"""Time one RL iteration with the exact levers off and on, and compare its network passes with the cost model.

python profiling/model/bench_iteration.py --config bench_levers --levers off,exact --json FILE
python profiling/model/bench_iteration.py --setting a "flow.tail_steps=8" --setting b "learn.window_steps=2" --json FILE
"""

from __future__ import annotations

import argparse
import shlex
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

LEVERS: dict[str, dict[str, Any]] = {
    "off": {"share_prefix": False, "merge_first_step": False, "prune_source": False, "streaming": "off"},
    "exact": {"share_prefix": True, "merge_first_step": True, "prune_source": True, "streaming": "graphs"},
}
WARM_UP = 2
"""The first iteration allocates and may measure a drift, whose audit falls on the second."""


class _Conditions:
    """Rendered pairs, so that no file is read inside the timed iteration."""

    def __init__(self, config: Config) -> None:
        assert config.world is not None, "the benchmark runs on the embedded world"
        pairs = paired_videos(config.world, config.groups.conditions, torch.Generator().manual_seed(0), style="real")
        self._batch = pairs.batch

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        """The same conditions in every iteration."""
        return self._batch.select(group_ids)


def trainer_of(config: Config) -> Trainer:
    """A fresh trainer of the base that the configuration names."""
    assert config.train.base is not None, "train.base is not set"
    policy = open_policy(config.train.base)
    return Trainer(config, policy, _Conditions(config), build_rewards(config.rewards))


def measure(configs: dict[str, Config], repeats: int) -> list[dict[str, Any]]:
    """Rows of the result file; settings take turns, so that a slow minute of the machine hits all alike."""
    trainers = {name: trainer_of(config) for name, config in configs.items()}
    for trainer in trainers.values():
        for _ in range(WARM_UP):
            trainer.step()
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    metrics: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for _ in range(repeats):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            metrics[name].append(trainer.step())
            seconds[name].append(time.perf_counter() - began)
    return [
        {
            "levers": name,
            "switches": config.levers.model_dump(include={*LEVERS["off"], "recompute"}),
            "seconds_median": float(np.median(seconds[name])),
            "seconds_p20": float(np.percentile(seconds[name], 20)),
            "seconds_p80": float(np.percentile(seconds[name], 80)),
            "cpu_s_mean": float(np.mean([row["perf/cpu_s"] for row in metrics[name]])),
            "repeats": repeats,
            "forward_equivalents": metrics[name][-1]["perf/forward_equivalents"],
            "predicted_forward_equivalents": metrics[name][-1]["perf/predicted_forward_equivalents"],
            "phases": _phases(metrics[name]),
        }
        for name, config in configs.items()
    ]


def _phases(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of every phase; what lies between two steps is the other settings' turn."""
    names = [name for name in rows[0] if name.startswith("time/") and name != "time/between_s"]
    return {name: float(np.median([row[name] for row in rows])) for name in names}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="bench_levers", help="preset or file")
    parser.add_argument("--levers", default="off,exact", help=f"comma-separated: {', '.join(LEVERS)}")
    parser.add_argument(
        "--setting", nargs=2, action="append", metavar=("NAME", "'KEY=VALUE ...'"),
        help="time these overrides instead of --levers (repeatable)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help=f"timed iterations per setting, after {WARM_UP} others")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    arguments = parser.parse_args()
    asked = arguments.levers.split(",")
    unknown = sorted(set(asked) - set(LEVERS))
    if unknown:
        parser.error(f"--levers: {', '.join(unknown)} unknown; choose from {', '.join(LEVERS)}")
    switched = {name: [f"levers.{key}={value}" for key, value in LEVERS[name].items()] for name in asked}
    changed = {name: shlex.split(text) for name, text in arguments.setting} if arguments.setting else switched
    configs = {name: load_config(Config, arguments.config, overrides) for name, overrides in changed.items()}
    config = next(iter(configs.values()))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    rows = measure(configs, arguments.repeats)
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
