"""What an evaluation knows of every held-out video, gathered over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.evaluators.base import PoseEstimate
from geoalign.geometry.metrics import AXES, axis_gains
from geoalign.training.processes.ranks import Ranks
from geoalign.world.pairs import PairedVideos

AXIS_METRICS = tuple(f"gain_{axis}" for axis in AXES)
"""Travelled over asked along each axis."""


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """What is known of the N videos of one kind; zero where another rank knows it.

    Attributes:
        names: the metrics of each video.
        pairs: the conditions and the truth.
        errors: ``[metrics, noise seeds, N]`` float64, in the order of ``names``.
        videos: ``[N, F, 3, H, W]``, of the first noise seed.
        estimated: ``[noise seeds, N, F, 4, 4]`` cameras read from them, zero in frames that were not read.
        read: ``[F]`` bool, which were.
    """

    names: tuple[str, ...]
    pairs: PairedVideos
    errors: Tensor
    videos: Tensor
    estimated: Tensor
    read: Tensor

    @staticmethod
    def empty(names: tuple[str, ...], pairs: PairedVideos, seeds: int) -> EvaluationTable:
        """Nothing yet."""
        count, frames = pairs.truth.shape[:2]
        errors = torch.zeros(len(names), seeds, count, dtype=torch.float64)
        estimated = torch.zeros(seeds, count, frames, 4, 4)
        read = torch.zeros(frames, dtype=torch.bool)
        return EvaluationTable(names, pairs, errors, torch.zeros_like(pairs.truth), estimated, read)

    def take(self, number: int, rows: Tensor, found: Mapping[str, Tensor], video: Tensor, pose: PoseEstimate) -> None:
        """Add the videos ``rows`` of noise seed ``number``."""
        for metric, name in enumerate(self.names):
            self.errors[metric, number, rows] = found[name].double().cpu()
        frames = pose.frame_indices.cpu()
        self.estimated[number, rows[:, None], frames] = pose.c2w.float().cpu()
        self.read[frames] = True
        if number == 0:
            self.videos[rows] = video

    def joined(self, ranks: Ranks) -> EvaluationTable:
        """The tables of all ranks in one: sums with zeros, so every number arrives bit for bit, NaN included."""
        parts = (self.errors, self.videos, self.estimated)
        errors, videos, estimated = (ranks.all_reduce(part, "sum", "evaluation") for part in parts)
        read = ranks.all_reduce(self.read.int(), "max", "evaluation").bool()
        return replace(self, errors=errors, videos=videos, estimated=estimated, read=read)

    def poses(self, number: int) -> Tensor:
        """``[N, K, 4, 4]`` cameras read from the videos of noise seed ``number`` in the frames that were read."""
        return self.estimated[number][:, self.read]

    def means(self) -> dict[str, list[float]]:
        """Metric -> one value per noise seed: the mean over the videos where it is defined, and the gains of all."""
        found = {
            name: [mean_of_defined(seed) for seed in rows]
            for name, rows in zip(self.names, self.errors.tolist(), strict=True)
        }
        wanted, plane = self.pairs.batch.target_camera.c2w[:, self.read], self.pairs.batch.source.ground_plane
        assert plane is not None
        gains = [axis_gains(self.poses(number), wanted, plane).tolist() for number in range(len(self.estimated))]
        return found | {name: list(values) for name, values in zip(AXIS_METRICS, zip(*gains, strict=True), strict=True)}


def mean_of_defined(values: Iterable[float | None]) -> float:
    """Mean of the values that are neither NaN nor None (NaN as JSON says it); NaN if there are none."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
