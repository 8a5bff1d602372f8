"""Does the embedded default really learn? The runs behind docs/learning.md, one JSON file each.

Main runs: three RL seeds from the shipped base and one from each of two fresh bases, each beside the oracles of its
base (``oracles.py``). Controls: advantages shuffled inside groups, camera gains frozen, a base trained on unbiased
labels, temporal weights that do not grow, and the perceptual reward alone. `make results` (``results.py``) runs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import torch
from record import config_settings, fingerprint, section_settings, shipped_base, write_result

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.evaluate import METRICS
from geoalign.jobs.prepare import render_missing_data

RESULTS = Path("docs/results/learning")
_BASE_LOCKS: dict[str, threading.Lock] = defaultdict(threading.Lock)
"""Two runs that start at once would both train the base that they share."""


@dataclass(frozen=True)
class Study:
    """One row of the table: a base, and what RL does with it."""

    name: str
    base: str
    overrides: tuple[str, ...] = ()


_PERCEPTUAL = ("advantage.weights.trans=0", "advantage.weights.rot=0", "advantage.weights.consistency=1")
STUDIES = (
    Study("shipped base, RL seed 1", "shipped", ("run.seed=1",)),
    Study("shipped base, RL seed 2", "shipped", ("run.seed=2",)),
    Study("shipped base, RL seed 3", "shipped", ("run.seed=3",)),
    Study("fresh base 12, RL seed 1", "12", ("run.seed=1",)),
    Study("fresh base 13, RL seed 1", "13", ("run.seed=1",)),
    Study("control: advantages shuffled", "shipped", ("run.seed=1", "train.shuffle_advantages=true")),
    Study("control: advantages shuffled, seed 2", "shipped", ("run.seed=2", "train.shuffle_advantages=true")),
    Study(
        "control: camera gains frozen",
        "shipped",
        ("run.seed=1", r"optim.trainable='\.self_attn\.(?!camera_gain)'", "optim.groups=[]"),
    ),
    Study("control: base with unbiased labels", "unbiased", ("run.seed=1",)),
    Study(
        "control: constant temporal weights",
        "shipped",
        ("run.seed=1", "rewards.geometry.options.temporal_weights=constant"),
    ),
    *(
        Study(f"control: perceptual reward only, seed {seed}", "shipped", (f"run.seed={seed}", *_PERCEPTUAL))
        for seed in (1, 2, 3)
    ),
)
ABLATION = {
    "consistency alone": tuple(f"control: perceptual reward only, seed {seed}" for seed in (1, 2, 3)),
    "full": tuple(f"shipped base, RL seed {seed}" for seed in (1, 2, 3)),
}
"""The runs of table 3 by reward: equal but for the geometry reward, which the first has with weight 0."""


# How a base that does not ship is pre-trained; the control on fewer pairs and not as long.
BASES = {
    "12": ("run.seed=12",),
    "13": ("run.seed=13",),
    "unbiased": (
        "pretrain.bias_mean=[0.0,0.0,0.0,0.0]",
        "run.seed=14",
        "pretrain.steps=1000",
        "pretrain.pool=3072",
    ),
}
# The bases whose oracles are fitted, with the name of that run.
ORACLES = {"shipped": "oracles, shipped base", "12": "oracles, fresh base 12", "13": "oracles, fresh base 13"}


def slug(name: str) -> str:
    """File name of a study, without a suffix."""
    return name.replace(":", "").replace(",", "").replace(" ", "_")


def base_settings(base: str, config: str) -> Any:
    """What a base depends on."""
    if base == "shipped":
        return shipped_base()
    return section_settings(config, BASES[base], ("world", "model", "codec", "flow", "pretrain"))


def settings(study: Study, config: str) -> dict[str, Any]:
    """What the result of a study depends on."""
    base = base_settings(study.base, config)
    return {**config_settings(config, study.overrides), "base": base, "metrics": METRICS}


def oracle_settings(base: str, config: str) -> dict[str, Any]:
    """What the oracles of a base depend on."""
    return {**oracles.settings(base_settings(base, config), config), "metrics": METRICS}


def geoalign(*arguments: str) -> None:
    """Run one command line of the product; its output goes to stderr on failure only."""
    done = subprocess.run([sys.executable, "-m", "geoalign", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"geoalign {' '.join(arguments)} failed:\n{done.stderr}")


def base_policy(name: str, work: Path, config: str) -> str:
    """Path of a base policy; trained here when it is not the shipped one and not there yet."""
    if name == "shipped":
        return "builtin:tiny_base"
    path = work / f"base_{name}_{fingerprint(base_settings(name, config))}.safetensors"
    with _BASE_LOCKS[name]:
        if not path.exists():
            geoalign("pretrain", "--config", config, *BASES[name], "--out", str(path))
    return str(path)


def render_world(work: Path, config: str) -> Path:
    """The world that all runs read, rendered before the first of them: two that start at once would both write it."""
    loaded = load_config(Config, config)
    root = work / f"world_{fingerprint({'world': loaded.world, 'data': loaded.data})}"
    render_missing_data(load_config(Config, config, [f"data.root={root}"]), 0)
    return root


def run_study(study: Study, result: Path, work: Path, config: str) -> None:
    """Run one study and write its result file; an interrupted run is continued."""
    base, made_with = base_policy(study.base, work, config), settings(study, config)
    folder, world = work / f"{slug(study.name)}_{fingerprint(made_with)}", render_world(work, config)
    overrides = [f"train.base={base}", f"run.dir={folder}", f"data.root={world}", *study.overrides]
    geoalign("train", "--config", config, "run.ranks=1", "--resume", "auto", *overrides)  # studies share the cores
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"study": study.name, "base": study.base, "overrides": list(study.overrides)}
    write_result(result, summary | {"by_frame": _errors_by_frame(folder)}, made_with)


def _errors_by_frame(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Of the first noise seed, before and after, over presets and random paths together."""
    found = {}
    for stage in ("before", "after"):
        clips = np.load(folder / "eval" / f"{stage}.npz")
        estimated, wanted = (torch.from_numpy(clips[name]) for name in ("estimated_c2w", "target_c2w"))
        found[stage] = oracles.mean_by_frame(estimated, wanted)
    return found


def run_oracles(base: str, result: Path, work: Path, config: str) -> None:
    """Fit and measure the oracles of one base."""
    oracles.run(result, base_policy(base, work, config), oracle_settings(base, config), config)
