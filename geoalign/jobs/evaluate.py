"""Held-out evaluation: fixed scenes, paths and noise; errors in metres and degrees against the true target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.evaluators.base import PoseEstimate, PoseEvaluator
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry.metrics import CAMERA_METRICS, camera_errors, errors_by_frame
from geoalign.geometry.plane import scaled_motion
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.evaluation_table import AXIS_METRICS, EvaluationTable, mean_of_defined
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.training.processes.ranks import LocalRanks, Ranks
from geoalign.types import RetakeBatch
from geoalign.world.pairs import PairedVideos, paired_videos
from geoalign_kernels import streams

LAST_FRAME_METRICS = ("last_translation_error_m", "last_rotation_error_deg")
PICTURE_METRICS = ("psnr_db", "own_camera_psnr_db", "explained_share", "gradient_energy")
"""Likeness to the true render along the wanted camera; along the camera read from the retake, which tells the picture's
quality from the camera's error; the share of the picture that the evaluator explains; energy of the picture's gradients
over that of the truth."""
METRICS = (*CAMERA_METRICS, *AXIS_METRICS, *LAST_FRAME_METRICS, *PICTURE_METRICS)
SECOND_METRICS = CAMERA_METRICS[:4]
"""What is reported of the second evaluator too, under ``second_`` and the metric's name."""
_BY_VIDEO = (
    *CAMERA_METRICS,
    *(f"second_{name}" for name in SECOND_METRICS),
    *LAST_FRAME_METRICS,
    *PICTURE_METRICS,
)
"""What is known of each video; the gains along the axes are of all videos together."""
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


def held_out_retake(
    policy: RetakePolicy,
    batch: RetakeBatch,
    flow: FlowConfig,
    *,
    seed: int,
    condition_scale: float | Tensor = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """The retakes ``[B, F, 3, H, W]`` of an evaluation, on the CPU: its own stream of noise, and its oracle.

    Args:
        condition_scale: multiplies the motion that the policy is asked for (an oracle that knows the error of a base):
            one number for the translation, or factors ``[4]`` or ``[F, 4]`` along the axes of the ground
            (:data:`geoalign.geometry.metrics.AXES`). Errors are always against the true target.
        rows: of the noise, as in :func:`geoalign.policy.retake.retake`.
    """
    asked = scaled_request(batch, condition_scale)
    return retake(policy, asked, flow, seed=seed, stream=streams.EVALUATION, rows=rows).cpu()


@torch.no_grad()
def evaluate(
    policy: RetakePolicy,
    config: Config,
    held_out: HeldOut,
    evaluator: PoseEvaluator | None = None,
    condition_scale: float | Tensor = 1.0,
    ranks: Ranks | None = None,
    progress: Callable[[int], object] = lambda videos: None,
) -> Evaluation:
    """Evaluate ``policy`` on all held-out sets and noise seeds.

    Videos are made and read a few at a time, in the same batches on any number of ranks, which all get the same numbers
    bit for bit.

    Args:
        policy: model and codec.
        config: its sampler settings, ``flow.tail_*`` aside, and noise seeds; sampling is deterministic.
        held_out: conditions and truth.
        condition_scale: as in :func:`held_out_retake`.
        evaluator: reads the cameras; default: the reward's planar aligner. The second evaluator always runs beside it.
        ranks: share the work, each of them with a whole model; all of them call this. Default: this process alone.
        progress: called with the number of videos that this process has made and read since the last call.
    """
    ranks, primary = ranks or LocalRanks(), evaluator or PlanarAligner()
    flow = config.flow.with_exact_tail()  # or runs that train with other tails would be measured by other samplers
    seeds = config.eval.noise_seeds
    tables = {kind: EvaluationTable.empty(_BY_VIDEO, pairs, len(seeds)) for kind, pairs in held_out.sets.items()}
    energies = {kind: float(_gradient_energy(pairs.truth[:, 1:]).mean()) for kind, pairs in held_out.sets.items()}
    pieces = [
        (kind, number, rows)
        for kind, pairs in held_out.sets.items()
        for number in range(len(seeds))
        for rows in torch.arange(len(pairs.batch)).tensor_split(-(-len(pairs.batch) // _TOGETHER))
    ]
    for kind, number, rows in pieces[ranks.rank :: ranks.size]:
        pairs = held_out.sets[kind].select(rows)
        seed, scale = seeds[number], condition_scale
        video = held_out_retake(policy, pairs.batch, flow, seed=seed, condition_scale=scale, rows=rows)
        pose, other = primary(video, pairs.batch.source), second_evaluator()(video, pairs.batch.source)
        found = _camera_quality(pose, other, pairs.batch.target_camera)
        found |= _picture_quality(video, pose, pairs, energies[kind])
        tables[kind].take(number, rows, found, video, pose)
        progress(len(rows))
    joined = {kind: table.joined(ranks) for kind, table in tables.items()}
    return Evaluation(
        {kind: table.means() for kind, table in joined.items()},
        {kind: table.videos for kind, table in joined.items()},
        {kind: table.poses(0) for kind, table in joined.items()},
    )


def scaled_request(batch: RetakeBatch, scale: float | Tensor) -> RetakeBatch:
    """``batch`` with its target motion multiplied as ``condition_scale`` of :func:`held_out_retake` says."""
    camera, plane = batch.target_camera, batch.source.ground_plane
    if not isinstance(scale, Tensor):
        return replace(batch, target_camera=camera.scale_translation(scale))
    assert plane is not None
    c2w = scaled_motion(camera.c2w, plane, torch.atleast_2d(scale))
    return replace(batch, target_camera=CameraTrajectory(c2w, camera.intrinsics))


def _camera_quality(pose: PoseEstimate, other: PoseEstimate, target: CameraTrajectory) -> dict[str, Tensor]:
    """Errors ``[B]`` of the cameras that both evaluators read; :data:`LAST_FRAME_METRICS` by the first."""
    errors = camera_errors(pose.c2w, target, pose.frame_indices)
    others = camera_errors(other.c2w, target, other.frame_indices)
    late = errors_by_frame(pose.c2w, target.c2w[:, pose.frame_indices])
    return {
        **errors,
        **{f"second_{name}": others[name] for name in SECOND_METRICS},
        **{f"last_{name}": values[:, -1] for name, values in late.items()},
    }


def _picture_quality(video: Tensor, pose: PoseEstimate, pairs: PairedVideos, true_energy: float) -> dict[str, Tensor]:
    """:data:`PICTURE_METRICS` ``[B]`` over the generated frames; ``true_energy``: mean of the whole set's truth."""
    later = pose.frame_indices > 0
    own = pairs.along(pose.c2w[:, later])
    values = (
        psnr_db(video[:, 1:], pairs.truth[:, 1:]),
        psnr_db(video[:, pose.frame_indices[later]], own),
        pose.tracked,
        _gradient_energy(video[:, 1:]) / true_energy,
    )
    return dict(zip(PICTURE_METRICS, values, strict=True))


def _gradient_energy(video: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of each video ``[B]``."""
    rows, columns = (video.diff(dim=dim).square().flatten(1).mean(1) for dim in (-2, -1))
    return rows + columns


def psnr_db(video: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB, ``[B]``; the peak-to-peak range is 2."""
    error = (video - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / error)
