"""The best of several retakes of one condition: made one after the other, each scored before it is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from geoalign.errors import RunError, UsageError
from geoalign.evaluators.base import NO_PLANE
from geoalign.evaluators.table import NEEDS_PLANE
from geoalign.jobs.score import judge, score_row
from geoalign.rewards.base import Reward
from geoalign.types import RetakeBatch


def check_reward(evaluator: object, batch: RetakeBatch) -> None:
    """Refuse, before anything is sampled, an evaluator that lacks the ground plane; raises UsageError."""
    if evaluator in NEEDS_PLANE and batch.source.ground_plane is None:
        raise UsageError(f"--best-of: {NO_PLANE.format(evaluator)}, or another --reward")


def best_of(
    seeds: Iterable[int],
    make: Callable[[int], Tensor],
    reward: Reward,
    batch: RetakeBatch,
    keep: Callable[[int, Tensor], object] = lambda seed, video: None,
) -> tuple[int, Tensor, list[dict[str, Any]]]:
    """Make a retake of each seed; the one with the largest sum of the reward's keys is the best.

    Args:
        seeds: of the initial noise.
        make: seed to video ``[1, F, 3, H, W]`` in [-1, 1].
        reward: scores the videos; its keys are added as they are (metres and radians of ``geometry``).
        batch: the one condition, on the CPU.
        keep: told of every video.

    Returns:
        the best seed, its video on the CPU, and a row for each seed: ``seed``, ``total``, ``valid`` and all numbers of
        the reward.

    Raises:
        RewardError: the reward failed.
        RunError: it found no video that it can score.
    """
    rows: list[dict[str, Any]] = []
    best: tuple[float, int, Tensor] | None = None
    for seed in seeds:
        video = make(seed).cpu()
        keep(seed, video)
        row = score_row(judge(reward, video, batch))
        total = sum(value for name, value in row.items() if name.startswith("score/")) if row["valid"] else None
        rows.append({"seed": seed, "total": total, **row})
        if total is not None and (best is None or total > best[0]):
            best = total, seed, video
    if best is None:
        raise RunError(f"reward {reward.name} could score none of {len(rows)} retakes; nothing is written")
    return best[1], best[2], rows
