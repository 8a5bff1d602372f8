"""Held-out evaluation: fixed scenes, paths and noise; errors in metres and degrees against the true target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.evaluators.base import PoseEstimate, PoseEvaluator
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry.metrics import CAMERA_METRICS, camera_errors
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.training.processes.ranks import LocalRanks, Ranks
from geoalign.world.pairs import PairedVideos, paired_videos
from geoalign_kernels import streams

METRICS = (*CAMERA_METRICS, "psnr_db")
SECOND_METRICS = CAMERA_METRICS[:4]
"""What is reported of the second evaluator too, under ``second_`` and the metric's name."""
_REPORTED = (*CAMERA_METRICS, *(f"second_{name}" for name in SECOND_METRICS), "psnr_db")
_TOGETHER = 8
"""Videos made at a time: rows of one batch, the same on any number of ranks."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out conditions with the true target videos, by kind ("presets", "random")."""

    sets: Mapping[str, PairedVideos]

    @staticmethod
    def build(config: Config) -> HeldOut:
        """Render the fixed sets: scenes of the RL style that no clip shows, correct labels.

        Raises ConfigError for a configuration without the embedded world, of which alone a true target is known.
        """
        if config.world is None:
            raise ConfigError("held-out pairs with a true render need the embedded world: set the world section")
        sets = {}
        for offset, kind in enumerate(("presets", "random")):
            generator = torch.Generator().manual_seed(config.eval.seed + offset)
            sets[kind] = paired_videos(config.world, config.eval.samples, generator, paths=kind, style="real")
        return HeldOut(sets)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of one policy.

    Attributes:
        numbers: kind -> metric -> one value per noise seed: the mean over the videos where the metric is defined.
        videos: kind -> ``[N, F, 3, H, W]`` retakes of the first noise seed.
        estimated: kind -> ``[N, F, 4, 4]`` cameras read from them.
    """

    numbers: Mapping[str, Mapping[str, list[float]]]
    videos: Mapping[str, Tensor]
    estimated: Mapping[str, Tensor]

    def mean(self, kind: str, metric: str) -> float:
        """Mean over noise seeds; kind "mean" averages the kinds. NaN is left out."""
        kinds: Iterable[str] = self.numbers if kind == "mean" else (kind,)
        return mean_of_defined(mean_of_defined(self.numbers[kind][metric]) for kind in kinds)


def second_evaluator() -> PlanarAligner:
    """An evaluator that no reward uses: other pixels, other blur, and the first source frame as the reference."""
    return PlanarAligner(levels=((3.0, 5), (1.5, 3)), step=5, offset=1, reference="first")


@torch.no_grad()
def evaluate(
    policy: RetakePolicy,
    config: Config,
    held_out: HeldOut,
    evaluator: PoseEvaluator | None = None,
    condition_scale: float = 1.0,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluate ``policy`` on all held-out sets and noise seeds.

    Videos are made and read a few at a time, in the same batches on any number of ranks, which all get the same numbers
    bit for bit.

    Args:
        policy: model and codec.
        config: its sampler settings and noise seeds; sampling is deterministic.
        held_out: conditions and truth.
        condition_scale: multiplies the translation that the policy is asked for (an oracle that knows the scale error
            of a base); errors are always against the true target.
        evaluator: reads the cameras; default: the reward's planar aligner. The second evaluator always runs beside it.
        ranks: share the work, each of them with a whole model; all of them call this. Default: this process alone.
    """
    ranks, primary = ranks or LocalRanks(), evaluator or PlanarAligner()
    seeds = config.eval.noise_seeds
    tables = {kind: _Table.empty(pairs, len(seeds)) for kind, pairs in held_out.sets.items()}
    pieces = [
        (kind, number, rows)
        for kind, pairs in held_out.sets.items()
        for number in range(len(seeds))
        for rows in torch.arange(len(pairs.batch)).tensor_split(-(-len(pairs.batch) // _TOGETHER))
    ]
    for kind, number, rows in pieces[ranks.rank :: ranks.size]:
        pairs = held_out.sets[kind]
        batch = pairs.batch.select(rows)
        asked = replace(batch, target_camera=batch.target_camera.scale_translation(condition_scale))
        video = retake(policy, asked, config.flow, seed=seeds[number], stream=streams.EVALUATION, rows=rows).cpu()
        pose, other = primary(video, batch.source), second_evaluator()(video, batch.source)
        errors = camera_errors(pose.c2w, batch.target_camera, pose.frame_indices)
        others = camera_errors(other.c2w, batch.target_camera, other.frame_indices)
        errors |= {f"second_{name}": others[name] for name in SECOND_METRICS}
        errors["psnr_db"] = psnr_db(video[:, 1:], pairs.truth[rows][:, 1:])
        tables[kind].take(number, rows, errors, video, pose)
    joined = {kind: table.joined(ranks) for kind, table in tables.items()}
    return Evaluation(
        {kind: table.means() for kind, table in joined.items()},
        {kind: table.videos for kind, table in joined.items()},
        {kind: table.estimated[:, table.read] for kind, table in joined.items()},
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """What is known of the N videos of one kind; zero where another rank knows it.

    Attributes:
        errors: ``[metrics, noise seeds, N]`` float64, in the order of :data:`_REPORTED`.
        videos: ``[N, F, 3, H, W]``, of the first noise seed.
        estimated: ``[N, F, 4, 4]`` cameras read from them, zero in frames that were not read.
        read: ``[F]`` bool, which were.
    """

    errors: Tensor
    videos: Tensor
    estimated: Tensor
    read: Tensor

    @staticmethod
    def empty(pairs: PairedVideos, seeds: int) -> _Table:
        """Nothing yet."""
        count, frames = pairs.truth.shape[:2]
        errors = torch.zeros(len(_REPORTED), seeds, count, dtype=torch.float64)
        estimated = torch.zeros(count, frames, 4, 4)
        return _Table(errors, torch.zeros_like(pairs.truth), estimated, torch.zeros(frames, dtype=torch.bool))

    def take(self, number: int, rows: Tensor, errors: Mapping[str, Tensor], video: Tensor, pose: PoseEstimate) -> None:
        """Add the videos ``rows`` of noise seed ``number``."""
        for metric, name in enumerate(_REPORTED):
            self.errors[metric, number, rows] = errors[name].double().cpu()
        if number == 0:
            self.videos[rows] = video
            self.estimated[rows[:, None], pose.frame_indices.cpu()] = pose.c2w.float().cpu()
            self.read[pose.frame_indices.cpu()] = True

    def joined(self, ranks: Ranks) -> _Table:
        """The tables of all ranks in one: sums with zeros, so every number arrives bit for bit, NaN included."""
        parts = (self.errors, self.videos, self.estimated)
        errors, videos, estimated = (ranks.all_reduce(part, "sum", "evaluation") for part in parts)
        return _Table(errors, videos, estimated, ranks.all_reduce(self.read.int(), "max", "evaluation").bool())

    def means(self) -> dict[str, list[float]]:
        """Metric -> one value per noise seed."""
        return {
            name: [mean_of_defined(seed) for seed in rows]
            for name, rows in zip(_REPORTED, self.errors.tolist(), strict=True)
        }


def mean_of_defined(values: Iterable[float | None]) -> float:
    """Mean of the values that are neither NaN nor None (NaN as JSON says it); NaN if there are none."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def psnr_db(video: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB, ``[B]``; the peak-to-peak range is 2."""
    error = (video - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / error)
