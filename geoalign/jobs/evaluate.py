"""Held-out evaluation: fixed scenes, paths and noise; errors in metres and degrees against the true target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.evaluators.base import PoseEstimate, PoseEvaluator
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry.metrics import CAMERA_METRICS, camera_errors
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.types import RetakeBatch
from geoalign.world.pairs import PairedVideos, paired_videos
from geoalign_kernels import streams

METRICS = (*CAMERA_METRICS, "psnr_db")
SECOND_METRICS = CAMERA_METRICS[:4]
"""What is reported of the second evaluator too, under ``second_`` and the metric's name."""


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


def held_out_retake(
    policy: RetakePolicy,
    batch: RetakeBatch,
    flow: FlowConfig,
    *,
    seed: int,
    condition_scale: float = 1.0,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The retakes ``[B, F, 3, H, W]`` of an evaluation, on the CPU: its own stream of noise, and its oracle.

    Args:
        condition_scale: multiplies the translation that the policy is asked for (an oracle that knows the scale error
            of a base); errors are always against the true target.
        rows: of the noise, as in :func:`geoalign.policy.retake.retake`.
    """
    asked = replace(batch, target_camera=batch.target_camera.scale_translation(condition_scale))
    return retake(policy, asked, flow, seed=seed, stream=streams.EVALUATION, rows=rows).cpu()


@torch.no_grad()
def evaluate(
    policy: RetakePolicy,
    config: Config,
    held_out: HeldOut,
    evaluator: PoseEvaluator | None = None,
    condition_scale: float = 1.0,
) -> Evaluation:
    """Evaluate ``policy`` on all held-out sets and noise seeds.

    Args:
        policy: model and codec.
        config: its sampler settings and noise seeds; sampling is deterministic.
        held_out: conditions and truth.
        condition_scale: as in :func:`held_out_retake`.
        evaluator: reads the cameras; default: the reward's planar aligner. The second evaluator always runs beside it.
    """
    primary, second = evaluator or PlanarAligner(), second_evaluator()
    numbers: dict[str, dict[str, list[float]]] = {}
    videos: dict[str, Tensor] = {}
    estimated: dict[str, Tensor] = {}
    for kind, pairs in held_out.sets.items():
        rows: dict[str, list[float]] = {}
        for number, noise_seed in enumerate(config.eval.noise_seeds):
            video = held_out_retake(policy, pairs.batch, config.flow, seed=noise_seed, condition_scale=condition_scale)
            pose = primary(video, pairs.batch.source)
            row = _mean_errors(pose, pairs.batch.target_camera)
            other = _mean_errors(second(video, pairs.batch.source), pairs.batch.target_camera)
            row |= {f"second_{name}": other[name] for name in SECOND_METRICS}
            row["psnr_db"] = psnr_db(video[:, 1:], pairs.truth[:, 1:])
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
            if number == 0:
                videos[kind], estimated[kind] = video, pose.c2w
        numbers[kind] = rows
    return Evaluation(numbers, videos, estimated)


def _mean_errors(estimate: PoseEstimate, target: CameraTrajectory) -> dict[str, float]:
    errors = camera_errors(estimate.c2w, target, estimate.frame_indices)
    return {name: mean_of_defined(values.tolist()) for name, values in errors.items()}


def mean_of_defined(values: Iterable[float | None]) -> float:
    """Mean of the values that are neither NaN nor None (NaN as JSON says it); NaN if there are none."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def psnr_db(video: Tensor, truth: Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB; the peak-to-peak range is 2."""
    error = (video - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / error)).mean())
