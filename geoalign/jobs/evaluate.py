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
from geoalign.geometry.metrics import (
    AXES,
    CAMERA_METRICS,
    axis_gains,
    camera_errors,
    errors_by_frame,
)
from geoalign.geometry.plane import scaled_motion
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.types import RetakeBatch
from geoalign.world.pairs import PairedVideos, paired_videos
from geoalign_kernels import streams

AXIS_METRICS = tuple(f"gain_{axis}" for axis in AXES)
"""Travelled over asked along each axis."""
LAST_FRAME_METRICS = ("last_translation_error_m", "last_rotation_error_deg")
PICTURE_METRICS = ("psnr_db", "own_camera_psnr_db", "explained_share", "gradient_energy")
"""Likeness to the true render along the wanted camera; along the camera read from the retake, which tells the picture's
quality from the camera's error; the share of the picture that the evaluator explains; energy of the picture's gradients
over that of the truth."""
METRICS = (*CAMERA_METRICS, *AXIS_METRICS, *LAST_FRAME_METRICS, *PICTURE_METRICS)
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


@torch.no_grad()
def evaluate(
    policy: RetakePolicy,
    config: Config,
    held_out: HeldOut,
    evaluator: PoseEvaluator | None = None,
    condition_scale: float | Tensor = 1.0,
) -> Evaluation:
    """Evaluate ``policy`` on all held-out sets and noise seeds.

    Args:
        policy: model and codec.
        config: its sampler settings and noise seeds; sampling is deterministic.
        held_out: conditions and truth.
        condition_scale: multiplies the motion that the policy is asked for (an oracle that knows the error of a base):
            one number for the translation, or factors ``[4]`` or ``[F, 4]`` along the axes of the ground
            (:data:`geoalign.geometry.metrics.AXES`). Errors are always against the true target.
        evaluator: reads the cameras; default: the reward's planar aligner. The second evaluator always runs beside it.
    """
    primary, second = evaluator or PlanarAligner(), second_evaluator()
    numbers: dict[str, dict[str, list[float]]] = {}
    videos: dict[str, Tensor] = {}
    estimated: dict[str, Tensor] = {}
    for kind, pairs in held_out.sets.items():
        rows: dict[str, list[float]] = {}
        asked = scaled_request(pairs.batch, condition_scale)
        for number, noise_seed in enumerate(config.eval.noise_seeds):
            video = retake(policy, asked, config.flow, seed=noise_seed, stream=streams.EVALUATION).cpu()
            pose = primary(video, pairs.batch.source)
            row = _mean_errors(pose, pairs.batch.target_camera)
            row |= _errors_by_axis_and_at_the_end(pose, pairs.batch) | _picture_quality(video, pose, pairs)
            other = _mean_errors(second(video, pairs.batch.source), pairs.batch.target_camera)
            row |= {f"second_{name}": other[name] for name in SECOND_METRICS}
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
            if number == 0:
                videos[kind], estimated[kind] = video, pose.c2w
        numbers[kind] = rows
    return Evaluation(numbers, videos, estimated)


def scaled_request(batch: RetakeBatch, scale: float | Tensor) -> RetakeBatch:
    """``batch`` with its target motion multiplied as ``condition_scale`` of :func:`evaluate` says."""
    camera, plane = batch.target_camera, batch.source.ground_plane
    if not isinstance(scale, Tensor):
        return replace(batch, target_camera=camera.scale_translation(scale))
    assert plane is not None
    c2w = scaled_motion(camera.c2w, plane, torch.atleast_2d(scale))
    return replace(batch, target_camera=CameraTrajectory(c2w, camera.intrinsics))


def _errors_by_axis_and_at_the_end(pose: PoseEstimate, batch: RetakeBatch) -> dict[str, float]:
    wanted, plane = batch.target_camera.c2w[:, pose.frame_indices], batch.source.ground_plane
    assert plane is not None
    gains = dict(zip(AXIS_METRICS, axis_gains(pose.c2w, wanted, plane).tolist(), strict=True))
    errors = errors_by_frame(pose.c2w, wanted)
    return gains | {f"last_{name}": mean_of_defined(values[:, -1].tolist()) for name, values in errors.items()}


def _picture_quality(video: Tensor, pose: PoseEstimate, pairs: PairedVideos) -> dict[str, float]:
    """:data:`PICTURE_METRICS` over the generated frames."""
    later = pose.frame_indices > 0
    own = pairs.along(pose.c2w[:, later])
    values = (
        psnr_db(video[:, 1:], pairs.truth[:, 1:]),
        mean_of_defined(_psnr_of_each(video[:, pose.frame_indices[later]], own).tolist()),
        mean_of_defined(pose.tracked.tolist()),
        _gradient_energy(video[:, 1:]) / _gradient_energy(pairs.truth[:, 1:]),
    )
    return dict(zip(PICTURE_METRICS, values, strict=True))


def _gradient_energy(video: Tensor) -> float:
    return float(video.diff(dim=-2).square().mean() + video.diff(dim=-1).square().mean())


def _mean_errors(estimate: PoseEstimate, target: CameraTrajectory) -> dict[str, float]:
    errors = camera_errors(estimate.c2w, target, estimate.frame_indices)
    return {name: mean_of_defined(values.tolist()) for name, values in errors.items()}


def mean_of_defined(values: Iterable[float | None]) -> float:
    """Mean of the values that are neither NaN nor None (NaN as JSON says it); NaN if there are none."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def psnr_db(video: Tensor, truth: Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB; the peak-to-peak range is 2."""
    return float(_psnr_of_each(video, truth).mean())


def _psnr_of_each(video: Tensor, truth: Tensor) -> Tensor:
    error = (video - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / error)
