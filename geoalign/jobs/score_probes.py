"""Probe a reward: honest renders of the embedded world against videos that try to cheat it."""

from __future__ import annotations

import math
from typing import Any

import torch

from geoalign.config.world import WorldConfig
from geoalign.jobs.score import judge
from geoalign.rewards.base import Reward
from geoalign.rewards.probes import PROBES
from geoalign.world.pairs import LabelBias, PairedVideos, paired_videos

# Corner tracking wants larger frames than the embedded world's own.
PROBE_SIZES = {"flow_pnp": (120, 208)}


def probe_table(reward: Reward, count: int = 40, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Mean score (sum of the reward's keys) of the honest render and of every probe, and how far each lies below it.

    ``wrong_scale`` is a true render along 1.4 times the requested motion. Means run over valid samples, of which
    ``valid`` of ``samples`` are left; without any, score and margin are NaN.

    Args:
        reward: what is probed.
        count: scenes.
        size: frame height and width in pixels; None takes the embedded world's.
    """
    world = WorldConfig()
    if size is not None:
        focal = world.focal_px * size[0] / world.height
        world = world.model_copy(update={"height": size[0], "width": size[1], "focal_px": focal})

    def render(bias: LabelBias | None) -> PairedVideos:
        return paired_videos(world, count, torch.Generator().manual_seed(5), style="real", bias=bias)

    pairs = render(None)
    videos = {"honest": pairs.truth, "wrong_scale": render(LabelBias(translation_mean=math.log(1.4))).truth}
    videos |= {name: probe(pairs.truth) for name, probe in PROBES.items()}
    rows: list[dict[str, Any]] = []
    for name, video in videos.items():
        output = judge(reward, video, pairs.batch)
        score = float(torch.stack(list(output.scores.values())).sum(0)[output.valid].mean())
        margin = (rows[0]["score"] if rows else score) - score
        valid = int(output.valid.sum())
        rows.append({"probe": name, "score": score, "margin": margin, "valid": valid, "samples": count})
    return rows


def print_probes(rows: list[dict[str, Any]]) -> None:
    """The table for people; a dash where no sample was valid."""
    print(f"{'probe':<14}{'score':>10}{'margin':>10}{'valid':>10}")
    for row in rows:
        numbers = (f"{'-' if math.isnan(row[name]) else format(row[name], '.3f'):>10}" for name in ("score", "margin"))
        share = f"{row['valid']}/{row['samples']}"
        print(f"{row['probe']:<14}{''.join(numbers)}{share:>10}")


def resists(rows: list[dict[str, Any]]) -> bool:
    """Whether every cheat, and some honest video, was scored, and every cheat lies below it."""
    return all(row["margin"] > 0 for row in rows[1:])
