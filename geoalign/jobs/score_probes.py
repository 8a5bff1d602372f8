"""Probe a reward: honest renders of the embedded world against videos that try to cheat it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoalign.config.flow import AdvantageConfig
from geoalign.config.world import WorldConfig
from geoalign.jobs.score import judge
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.probes import PROBES
from geoalign.rewards.running.guard import concatenate
from geoalign.rl.advantage import group_advantage
from geoalign.world.pairs import LabelBias, PairedVideos, paired_videos

# Corner tracking wants larger frames than the embedded world's own.
PROBE_SIZES = {"flow_pnp": (120, 208)}


def probe_table(reward: Reward, count: int = 40, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Mean score (sum of the reward's keys) of the honest render and of every probe, and how far each lies below it.

    ``wrong_scale`` is a true render along 1.4 times the requested motion. Means run over the samples that the reward
    can read: ``valid`` of ``samples`` less those that are ``lost``; without any, score and margin are NaN.
    ``advantage`` is the mean over valid samples when the honest render and all probes of a scene form a group (the
    default settings of eq. 5), which ranks lost samples too.

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
    videos = {"honest": pairs.truth, "wrong_scale": render(LabelBias.translation(1.4)).truth}
    videos |= {name: probe(pairs.truth) for name, probe in PROBES.items()}
    outputs = {name: judge(reward, video, pairs.batch) for name, video in videos.items()}
    rows: list[dict[str, Any]] = []
    for (name, output), advantage in zip(outputs.items(), _advantages(list(outputs.values()), count), strict=True):
        score = float(torch.stack(list(output.scores.values())).sum(0)[output.valid & ~output.lost].mean())
        margin = (rows[0]["score"] if rows else score) - score
        row = {"probe": name, "score": score, "margin": margin, "advantage": float(advantage[output.valid].mean())}
        rows.append(row | {"valid": int(output.valid.sum()), "lost": int(output.lost.sum()), "samples": count})
    return rows


def _advantages(outputs: Sequence[RewardOutput], scenes: int) -> Tensor:
    """``[outputs, scenes]`` advantages inside the groups that the videos of a scene form."""
    table = concatenate(outputs)
    groups = torch.arange(scenes).repeat(len(outputs))
    return group_advantage(table.scores, table.valid, groups, AdvantageConfig(), table.lost).values.view(-1, scenes)


def print_probes(rows: list[dict[str, Any]]) -> None:
    """The table for people; a dash where no sample could be read."""
    columns = ("score", "margin", "advantage")
    print(f"{'probe':<14}{''.join(f'{name:>10}' for name in columns)}{'valid':>10}{'lost':>10}")
    for row in rows:
        numbers = (f"{'-' if math.isnan(row[name]) else format(row[name], '.3f'):>10}" for name in columns)
        shares = (f"{row[name]}/{row['samples']}" for name in ("valid", "lost"))
        print(f"{row['probe']:<14}{''.join(numbers)}{''.join(f'{share:>10}' for share in shares)}")


def resists(rows: list[dict[str, Any]]) -> bool:
    """Whether every cheat lies below the honest video, by score where it can be read, and by advantage.

    False too where no sample of a cheat is valid, or no honest one can be read.
    """
    honest, *cheats = rows

    def beaten(row: dict[str, Any]) -> bool:
        readable = row["valid"] > row["lost"]
        return row["advantage"] < honest["advantage"] and (row["margin"] > 0 or not readable)

    return not math.isnan(honest["score"]) and all(beaten(row) for row in cheats)
