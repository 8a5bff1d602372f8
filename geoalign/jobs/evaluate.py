"""Held-out evaluation: fixed scenes, paths and noise; errors in metres and degrees against the true target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.training import EvalConfig
from geoalign.config.world import WorldConfig
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.planar import PlanarAligner
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.geometry import so3
from geoalign.policy.policy import RetakePolicy
from geoalign.types import RetakeBatch
from geoalign.world.pairs import PairedVideos, paired_videos

EVALUATION_STREAM = 4
METRICS = ("translation_error_m", "rotation_error_deg", "scale_ratio", "psnr_db")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out conditions with the true target videos, by kind ("presets", "random")."""

    sets: Mapping[str, PairedVideos]

    @staticmethod
    def build(world: WorldConfig, config: EvalConfig) -> HeldOut:
        """Render the fixed sets: scenes of the RL style that no clip shows, correct labels."""
        sets = {}
        for offset, (kind, paths) in enumerate((("presets", "presets"), ("random", "random"))):
            generator = torch.Generator().manual_seed(config.seed + offset)
            sets[kind] = paired_videos(world, config.samples, generator, paths=paths, style="real")
        return HeldOut(sets)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of one policy.

    Attributes:
        numbers: kind -> metric -> one value per noise seed.
        videos: kind -> ``[N, F, 3, H, W]`` retakes of the first noise seed.
        estimated: kind -> ``[N, F, 4, 4]`` cameras read from them.
    """

    numbers: Mapping[str, Mapping[str, list[float]]]
    videos: Mapping[str, Tensor]
    estimated: Mapping[str, Tensor]

    def mean(self, kind: str, metric: str) -> float:
        """Mean over noise seeds; kind "mean" averages the kinds."""
        kinds: Iterable[str] = self.numbers if kind == "mean" else (kind,)
        values = [sum(self.numbers[k][metric]) / len(self.numbers[k][metric]) for k in kinds]
        return sum(values) / len(values)


def second_evaluator() -> PlanarAligner:
    """An evaluator that no reward uses: other pixels, other blur, and the first source frame as the reference."""
    return PlanarAligner(levels=((3.0, 5), (1.5, 3)), step=5, offset=1, reference="first")


@torch.no_grad()
def retake(policy: RetakePolicy, flow: FlowConfig, batch: RetakeBatch, noise_seed: int) -> Tensor:
    """Deterministic retakes ``[B, F, 3, H, W]`` from fixed noise, on the CPU."""
    precomputed = policy.precompute(policy.condition(batch))
    ids = torch.arange(len(batch), device=policy.device)
    noise = initial_noise(policy.latent_shape(batch), noise_seed, 0, ids, stream=EVALUATION_STREAM)
    latents = FlowSampler(build_step_table(flow)).sample(policy.velocity, precomputed, noise)
    return policy.decode(latents, batch.source.video).cpu()


@torch.no_grad()
def evaluate(
    policy: RetakePolicy,
    flow: FlowConfig,
    held_out: HeldOut,
    config: EvalConfig,
    evaluator: PoseEvaluator | None = None,
    condition_scale: float = 1.0,
) -> Evaluation:
    """Evaluate ``policy`` on all held-out sets and noise seeds.

    Args:
        policy: model and codec.
        flow: sampler settings; sampling is deterministic.
        held_out: conditions and truth.
        config: noise seeds.
        condition_scale: multiplies the translation that the policy is asked for (an oracle that knows the scale error
            of a base); errors are always against the true target.
        evaluator: reads the cameras; default: the reward's planar aligner. The second evaluator always runs beside it.
    """
    primary, second = evaluator or PlanarAligner(), second_evaluator()
    numbers: dict[str, dict[str, list[float]]] = {}
    videos: dict[str, Tensor] = {}
    estimated: dict[str, Tensor] = {}
    for kind, pairs in held_out.sets.items():
        rows: dict[str, list[float]] = {}
        asked = replace(pairs.batch, target_camera=pairs.batch.target_camera.scale_translation(condition_scale))
        for number, noise_seed in enumerate(config.noise_seeds):
            video = retake(policy, flow, asked, noise_seed)
            pose = primary(video, pairs.batch.source).c2w
            row = camera_errors(pose, pairs.batch.target_camera.c2w)
            other = camera_errors(second(video, pairs.batch.source).c2w, pairs.batch.target_camera.c2w)
            row |= {f"second_{name}": other[name] for name in METRICS[:3]}
            row["psnr_db"] = psnr_db(video[:, 1:], pairs.truth[:, 1:])
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
            if number == 0:
                videos[kind], estimated[kind] = video, pose
        numbers[kind] = rows
    return Evaluation(numbers, videos, estimated)


def camera_errors(estimate: Tensor, target: Tensor, worst_m: float = 3.0) -> dict[str, float]:
    """Unweighted errors of ``[B, F, 4, 4]`` poses over frames 1.., and the least-squares scale of the translation."""
    translation = so3.safe_norm(estimate[:, 1:, :3, 3] - target[:, 1:, :3, 3]).clamp_max(worst_m)
    moved, wanted = estimate[:, 1:, :3, 3], target[:, 1:, :3, 3]
    rotation = torch.rad2deg(so3.relative_angle(estimate[:, 1:, :3, :3], target[:, 1:, :3, :3]))
    scale = (moved * wanted).sum((1, 2)) / wanted.square().sum((1, 2)).clamp_min(1e-9)
    return {
        "translation_error_m": float(translation.mean()),
        "rotation_error_deg": float(rotation.mean()),
        "scale_ratio": float(scale.mean()),
    }


def psnr_db(video: Tensor, truth: Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB; the peak-to-peak range is 2."""
    error = (video - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / error)).mean())
