"""What factors on the request could mend of a base, without any learning: the yardsticks of docs/learning.md.

Three oracles for a base: the best single factor on the requested translation, the best factor per axis (sideways,
forward, vertical, yaw), and the best per axis and frame. Fitted on a calibration set (scenes, paths and noise of their
own), measured on the held-out one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import section_settings, write_result
from torch import Tensor

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry.metrics import AXES, axis_gains, camera_errors, errors_by_frame
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.environment import describe_environment
from geoalign.jobs.evaluate import HeldOut, evaluate, scaled_request
from geoalign.policy.open import open_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.types import RetakeBatch
from geoalign_kernels import streams

CALIBRATION = ("eval.seed=4777", "eval.samples=80", "eval.noise_seeds=[21]")
STAGES = ("plain", "single", "axis", "frame")
_TOGETHER = 8  # videos made at a time
_LIMITS = (0.4, 2.5)  # of a factor: beyond, a path leaves what the base was trained on
_GRID, _STEP, _ROUNDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2), 1.12, 2


class Calibration:
    """Errors of one base on the calibration set as a function of the factors on its request."""

    def __init__(self, policy: RetakePolicy, config: Config) -> None:
        self.policy, self.config = policy, config
        self.sets = HeldOut.build(config)
        self.plain = self(1.0)

    def __call__(self, factor: float | Tensor) -> dict[str, Any]:
        """Mean position (m) and rotation error (deg), and the gains ``[F - 1, 4]`` by frame and ``[4]`` in all."""
        batches = [pairs.batch for pairs in self.sets.sets.values()]
        found = torch.cat([self._read(batch, factor) for batch in batches])
        wanted = torch.cat([batch.target_camera.c2w for batch in batches])
        plane = torch.cat([batch.source.ground_plane for batch in batches if batch.source.ground_plane is not None])
        errors = camera_errors(found, CameraTrajectory.build(wanted))
        frames = range(1, wanted.shape[1])
        return {
            "position": float(errors["translation_error_m"].nanmean()),
            "rotation": float(errors["rotation_error_deg"].nanmean()),
            "gains": axis_gains(found, wanted, plane),
            "by_frame": torch.stack([axis_gains(found[:, f : f + 1], wanted[:, f : f + 1], plane) for f in frames]),
        }

    def _read(self, batch: RetakeBatch, factor: float | Tensor) -> Tensor:
        """Cameras of retakes; only these, because the search asks some forty times."""
        asked, seed = scaled_request(batch, factor), self.config.eval.noise_seeds[0]
        parts = torch.arange(len(batch)).split(_TOGETHER)
        videos = [
            retake(self.policy, asked.select(rows), self.config.flow, seed=seed, stream=streams.EVALUATION, rows=rows)
            for rows in parts
        ]
        return PlanarAligner()(torch.cat(videos), batch.source).c2w

    def cost(self, answer: Mapping[str, Any]) -> float:
        """Position and rotation error, each over that of the plain request; what the oracles per axis minimise."""
        return answer["position"] / self.plain["position"] + answer["rotation"] / self.plain["rotation"]


def best_single(calibration: Calibration) -> float:
    """The factor on the translation with the smallest position error: a grid, then a parabola through its best."""
    found = {scale: calibration(scale)["position"] for scale in _GRID}
    middle = min(found, key=lambda scale: found[scale])
    inner = min(max(_GRID.index(middle), 1), len(_GRID) - 2)
    points = _GRID[inner - 1 : inner + 2]
    scale = points[1] + _vertex(tuple(found[p] for p in points)) * (points[2] - points[1])
    return scale if calibration(scale)["position"] < found[middle] else middle


def best_per_axis(calibration: Calibration) -> Tensor:
    """Factors ``[4]`` with the smallest :meth:`Calibration.cost`: from the inverse gains, along one axis at a time."""
    factors = torch.ones(4, dtype=torch.float32)
    answer = calibration.plain
    for _ in range(2):
        factors = (factors / answer["gains"].float()).clamp(*_LIMITS)
        answer = calibration(factors)
    best = calibration.cost(answer)
    for axis in list(range(len(AXES))) * _ROUNDS:
        around = [factors.clone() for _ in range(2)]
        around[0][axis] /= _STEP
        around[1][axis] *= _STEP
        low, high = (calibration.cost(calibration(candidate)) for candidate in around)
        middle = factors.clone()
        middle[axis] = (middle[axis] * _STEP ** _vertex((low, best, high))).clamp(*_LIMITS)
        costs = [best, low, high, calibration.cost(calibration(middle))]
        number = costs.index(min(costs))
        factors, best = [factors, *around, middle][number], costs[number]
    return factors


def best_per_axis_and_frame(calibration: Calibration, axis: Tensor) -> Tensor:
    """Factors ``[F, 4]``: the best per axis, corrected by how the gains of its retakes differ from frame to frame.

    Tried: all of that correction, half of it, and that of the label law (log factors that grow over the clip).
    """
    assert calibration.config.world is not None
    frames = calibration.config.world.frames
    answer = calibration(axis)
    ratio = answer["gains"] / answer["by_frame"]
    correction = torch.cat([torch.ones(1, 4), ratio.float()]).nan_to_num(1.0).clamp(0.5, 2.0)
    start, rise = calibration.config.pretrain.bias_growth
    growth = start + rise * torch.linspace(0, 1, frames)[:, None]
    weight = torch.linspace(0, 1, frames)[1:].square()  # of a frame in a gain: motions grow about linearly
    growth = growth / ((growth[1:, 0] * weight).sum() / weight.sum())
    candidates = [axis.expand(frames, 4), axis * correction, axis * correction.sqrt(), axis**growth]
    candidates = [candidate.clamp(*_LIMITS) for candidate in candidates]
    costs = [calibration.cost(answer), *(calibration.cost(calibration(candidate)) for candidate in candidates[1:])]
    return candidates[costs.index(min(costs))]


def _vertex(values: tuple[float, ...]) -> float:
    """Where a parabola through values at -1, 0 and 1 is smallest, within one step; 0 if it has no minimum."""
    low, middle, high = values
    bend = low - 2 * middle + high
    return 0.0 if bend <= 0 else max(-1.0, min(1.0, (low - high) / (2 * bend)))


def settings(base: Any, config: str) -> dict[str, Any]:
    """What the oracles of a base depend on."""
    search = {"grid": _GRID, "step": _STEP, "rounds": _ROUNDS, "limits": _LIMITS}
    read = section_settings(config, (), ("world", "flow", "eval", "pretrain"))
    return {**read, "base": base, "calibration": CALIBRATION, "search": search}


def mean_by_frame(estimated: Tensor, wanted: Tensor) -> dict[str, list[float]]:
    """Mean position (m) and rotation error (deg) over videos of each generated frame; poses ``[N, F, 4, 4]``."""
    return {name: values.nanmean(0)[1:].tolist() for name, values in errors_by_frame(estimated, wanted).items()}


def run(result: Path, base: str, made_with: Mapping[str, Any], config: str) -> None:
    """Fit and measure the oracles of the policy ``base``."""
    torch.set_num_threads(1)
    loaded, policy = load_config(Config, config), open_policy(base)
    samples = min(loaded.eval.samples * 2, 80)
    calibration = Calibration(policy, load_config(Config, config, [*CALIBRATION, f"eval.samples={samples}"]))
    single, axis = best_single(calibration), best_per_axis(calibration)
    frame = best_per_axis_and_frame(calibration, axis)
    held_out = HeldOut.build(loaded)
    stages: dict[str, Any] = {"plain": 1.0, "single": single, "axis": axis, "frame": frame}
    numbers: dict[str, Any] = {}
    frames: dict[str, Any] = {}
    for stage, factor in stages.items():
        found = evaluate(policy, loaded, held_out, condition_scale=factor)
        for kind in held_out.sets:
            numbers.setdefault(kind, {})[stage] = found.numbers[kind]
        wanted = [pairs.batch.target_camera.c2w for pairs in held_out.sets.values()]
        frames[stage] = mean_by_frame(torch.cat([found.estimated[kind] for kind in held_out.sets]), torch.cat(wanted))
    summary = {
        "factors": {"single": single, "axis": axis.tolist(), "frame": frame.tolist()},
        "held_out_per_noise_seed": numbers,
        "by_frame": frames,
        **describe_environment(),
    }
    write_result(result, summary, made_with)
