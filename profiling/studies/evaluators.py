"""How well the weight-free evaluators read true renders: errors over motions, codec, blur, noise and moving things.

`make results` (``results.py``) runs the study and writes its tables into docs/evaluators.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write_result
from torch import Tensor

from geoalign.config.world import WorldConfig
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.flow_pnp import FlowPnpEvaluator
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry import metrics
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.environment import describe_environment
from geoalign.jobs.evaluate import second_evaluator
from geoalign.models.codec import PatchCodec
from geoalign.world.pairs import LabelBias, PairedVideos, paired_videos

COUNT, SEED = 60, 5
RESULT, PAGE = Path("docs/results/evaluators.json"), Path("docs/evaluators.md")
SMALL = WorldConfig()
# The size that corner tracking asks for; the focal length grows with the height, so the view stays as wide.
LARGE = WorldConfig(height=120, width=208, focal_px=130.0)
NOTHING = -30.0
"""Logarithm of a factor that leaves no motion."""
Row = dict[str, float]


def blurred(video: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``sigma`` pixels."""
    radius = int(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = torch.outer(line, line)[None, None].expand(3, 1, -1, -1) / line.sum() ** 2
    padded = F.pad(video.flatten(0, 1), (radius,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=3).unflatten(0, video.shape[:2])


def noisy(video: Tensor, level: float, seed: int = 0) -> Tensor:
    """White noise of standard deviation ``level`` added to pixels in [-1, 1]."""
    return video + level * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))


def with_foreground(video: Tensor) -> Tensor:
    """A textured square, a quarter of the height wide, that crosses a third of the picture while the camera moves."""
    frames, _, height, width = video.shape[1:]
    side = height // 4
    patch = noisy(torch.zeros(1, 1, 3, 8, 8), 0.6, seed=7)[0, 0]
    patch = F.interpolate(patch[None], size=(side, side), mode="bicubic")[0].clamp(-1, 1)
    video = video.clone()
    for i in range(frames):
        left = width // 3 + i * width // (3 * frames)
        video[:, i, :, height // 2 : height // 2 + side, left : left + side] = patch
    return video


def corrupted(pairs: PairedVideos) -> dict[str, Tensor]:
    """The true videos and what may happen to them on the way to an evaluator."""
    truth = pairs.truth
    codec = PatchCodec().fit(pairs.batch.source.video)
    latents = codec.encode(truth)
    return {
        "raw render": truth,
        "through the codec": codec.decode(latents),
        "blur, 1.5 px": blurred(truth, 1.5),
        "blur, 3 px": blurred(truth, 3.0),
        "pixel noise 0.05": noisy(truth, 0.05, 0),
        "pixel noise 0.2": noisy(truth, 0.2, 1),
        "latent noise 0.2": codec.decode(noisy(latents, 0.2, 2)),
        "latent noise 0.4": codec.decode(noisy(latents, 0.4, 3)),
    }


def errors(evaluator: PoseEvaluator, video: Tensor, pairs: PairedVideos, true: CameraTrajectory) -> Row:
    """Mean errors over frames 1.., the median end error as a share of the true path, the median of the path that was
    read over the path that was asked for, the mean tracked share, and the share of lost videos."""
    estimate = evaluator(video, pairs.batch.source)
    found = CameraTrajectory.build(estimate.c2w)
    translation = metrics.position_distances_m(found, true)[:, 1:]
    rotation = metrics.view_angles_deg(found, true)[:, 1:]
    return {
        "translation_m": float(translation.mean()),
        "translation_median_m": float(translation.median()),
        "rotation_deg": float(rotation.mean()),
        "rotation_median_deg": float(rotation.median()),
        "share_of_path": float((translation[:, -1] / true.path_length().clamp_min(0.1)).median()),
        "read_over_asked": float(metrics.scale_ratio(found, pairs.batch.target_camera).nanmedian()),
        "tracked": float(estimate.tracked.mean()),
    }


def study() -> dict[str, dict[str, dict[str, Row]]]:
    """evaluator -> motions -> condition -> errors, at the embedded world's own size."""
    evaluators = {"reward (planar)": PlanarAligner(), "second": second_evaluator()}
    results: dict[str, dict[str, dict[str, Row]]] = {name: {} for name in evaluators}
    for kind in ("presets", "random"):
        pairs = paired_videos(SMALL, COUNT, torch.Generator().manual_seed(SEED), paths=kind, style="real")
        videos = corrupted(pairs)
        for name, evaluator in evaluators.items():
            results[name][kind] = {
                label: errors(evaluator, video, pairs, pairs.batch.target_camera) for label, video in videos.items()
            }
    return results


def behaviour() -> dict[str, dict[str, Row]]:
    """evaluator -> what happens in the video -> errors against what the camera truly did."""
    evaluators: dict[str, tuple[PoseEvaluator, WorldConfig]] = {
        "planar": (PlanarAligner(), SMALL),
        "flow_pnp": (FlowPnpEvaluator(), LARGE),
    }
    half = LabelBias((math.log(0.5),) * 4)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "moving foreground": with_foreground,
        "blur, 1.5 px": lambda video: blurred(video, 1.5),
        "blur, 3 px": lambda video: blurred(video, 3.0),
        "pixel noise 0.05": lambda video: noisy(video, 0.05),
        "pixel noise 0.2": lambda video: noisy(video, 0.2),
        "noise alone": lambda video: noisy(torch.zeros_like(video), 1.0).clamp(-1, 1),
    }
    results: dict[str, dict[str, Row]] = {}
    for name, (evaluator, world) in evaluators.items():

        def render(bias: LabelBias | None = None, world: WorldConfig = world) -> PairedVideos:
            return paired_videos(
                world, COUNT, torch.Generator().manual_seed(SEED), paths="presets", style="real", bias=bias
            )

        honest, halved, turned = render(), render(half), render(LabelBias((NOTHING, NOTHING, NOTHING, 0.0)))
        label = honest.batch.target_camera
        rows = results[name] = {
            "raw render": errors(evaluator, honest.truth, honest, label),
            "half the motion": errors(
                evaluator, halved.truth, halved, label.scale_translation(0.5).scale_rotation(0.5)
            ),
            "pure rotation": errors(evaluator, turned.truth, turned, label.scale_translation(0.0)),
        }
        for what, change in changes.items():
            rows[what] = errors(evaluator, change(honest.truth), honest, label)
    return results


def table(results: dict[str, dict[str, dict[str, Row]]]) -> str:
    """Markdown table of the study."""
    lines = [
        "| evaluator | motions | video | translation | rotation | end error / path |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kinds in results.items():
        for kind, rows in kinds.items():
            for label, row in rows.items():
                numbers = (
                    f"{100 * row['translation_m']:.1f} cm | {row['rotation_deg']:.2f} deg | {row['share_of_path']:.1%}"
                )
                lines.append(f"| {name} | {kind} | {label} | {numbers} |")
    return "\n".join(lines)


def behaviour_table(results: dict[str, dict[str, Row]]) -> str:
    """Markdown table of what evaluators make of special videos."""
    lines = [
        "| evaluator | video | translation, mean (median) | rotation, mean (median) | path read / asked | tracked |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in results.items():
        for label, row in rows.items():
            metres = f"{100 * row['translation_m']:.1f} cm ({100 * row['translation_median_m']:.1f})"
            degrees = f"{row['rotation_deg']:.2f} deg ({row['rotation_median_deg']:.2f})"
            rest = f"{row['read_over_asked']:.2f} | {row['tracked']:.2f}"
            lines.append(f"| {name} | {label} | {metres} | {degrees} | {rest} |")
    return "\n".join(lines)


def settings() -> dict[str, Any]:
    """What the result depends on; a change of an evaluator's code is for whoever makes it to remember."""
    worlds = [world.model_dump(mode="json") for world in (SMALL, LARGE)]
    return {"videos": COUNT, "seed": SEED, "worlds": worlds}


def run(path: Path) -> None:
    """Run the study and write its result file."""
    torch.set_num_threads(1)
    sizes = {"planar": (SMALL.height, SMALL.width), "flow_pnp": (LARGE.height, LARGE.width)}
    counts = {"videos": COUNT, "frames": SMALL.frames, "sizes": sizes}
    write_result(path, {"results": study(), "behaviour": behaviour(), **counts, **describe_environment()}, settings())


def page(root: Path) -> str:
    """The generated part of the page, from the result file alone."""
    result = json.loads((root / RESULT).read_text())
    where = f"{result['device']}, commit {result['commit']}"
    sizes = " and ".join(f"{height} x {width} ({name})" for name, (height, width) in result["sizes"].items())
    return "\n\n".join(
        (
            table(result["results"]),
            f"{result['videos']} videos of {result['frames']} frames, 48 x 64; {where}.",
            behaviour_table(result["behaviour"]),
            f"{result['videos']} preset motions of {result['frames']} frames, {sizes}; errors are against what the "
            f"camera truly did, the ratio against what was asked; {where}.",
        )
    )
