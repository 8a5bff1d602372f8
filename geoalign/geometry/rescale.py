"""Truncated-Gaussian speed rescaling of target trajectories (Geo-Align eq. 8 to 14), with every guard reported.

A game trajectory has an arbitrary unit and any speed. Its largest frame-to-frame translation and rotation are scaled to
speeds tau drawn from two truncated Gaussians: ``s = tau / v_max``, ``t' = s_t t`` and, per mode:

- ``paper``: ``R' = exp(s_r log R)`` literally. The principal logarithm flips its axis at 180 degrees, and there one
  frame jumps by tens of degrees; inter-frame speed is only approximately tau on paths that turn about several axes.
- ``unwrapped`` (default): the logarithm is continued along the sequence, and s_r is corrected by a fixed-point
  iteration until the peak speed is tau.
- ``egocentric``: body-frame increments are scaled and re-integrated, so speeds equal tau exactly and motion stays
  aligned with the view (eq. 13 keeps frame-0 axes and turns a walk after a bend into a crab walk).

Everything runs in float64 on the CPU for one trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from geoalign.errors import ConfigError, DataError
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory

RescaleMode = Literal["paper", "unwrapped", "egocentric"]
_FIXED_POINT_STEPS = 12
_SPEED_TOLERANCE = 0.02
# Up to 180 degrees of accumulated rotation, scaling down overshoots by at most pi/2, so a smaller correction than 1/2
# means that the path came near a full turn, where the logarithm is singular and its shape is lost.
_LARGEST_CORRECTION = 0.5


def truncated_gaussian(uniform: ArrayLike, mean: float, std: float, low: float, high: float) -> NDArray[np.float64]:
    """Inverse CDF at ``uniform`` in (0, 1) of a Gaussian restricted to [low, high]; std 0 gives the clipped mean.

    Works on logarithms of the CDF and mirrors intervals that lie in the upper tail, so that it stays finite and inside
    the bounds for intervals any number of standard deviations away.

    Raises:
        ConfigError: low > high or a negative std.
    """
    from scipy import special

    u = np.asarray(uniform, dtype=np.float64)
    if not (std >= 0 and low <= high):
        raise ConfigError(f"a truncated Gaussian needs std >= 0 and low <= high, got std {std} on [{low}, {high}]")
    if std == 0 or low == high:
        return np.full_like(u, min(max(mean, low), high))
    a, b = (low - mean) / std, (high - mean) / std
    sign = 1.0
    if a > 0:
        a, b, u, sign = -b, -a, 1 - u, -1.0
    with np.errstate(divide="ignore"):  # u of exactly 0 or 1 is the bound itself
        log_cdf = np.logaddexp(special.log_ndtr(a) + np.log1p(-u), special.log_ndtr(b) + np.log(u))
    x = sign * special.ndtri_exp(log_cdf)
    return np.clip(mean + std * x, low, high)


@dataclass(frozen=True, slots=True)
class SpeedLaw:
    """Truncated Gaussian of a peak speed per second (m/s or deg/s)."""

    mean: float
    std: float
    low: float
    high: float

    def __call__(self, uniform: float) -> float:
        """The speed at one uniform number in (0, 1)."""
        return float(truncated_gaussian(uniform, self.mean, self.std, self.low, self.high))


@dataclass(frozen=True, slots=True)
class RescaleSettings:
    """How target trajectories are rescaled. The paper prints none of these numbers; the reasons are physical.

    Attributes:
        fps: playback rate that turns speeds per second into steps per frame.
        translation: m/s; the mean is a calm walk, the upper bound a brisk one.
        rotation: deg/s; comfortable pans lie between 10 and 30.
        static_rotation_deg: peak raw rotation per frame up to which the path counts as not turning (s_r = 1).
        max_rotation_scale: cap on s_r, so that jitter is never amplified to a pan.
        max_yaw_deg, max_path_m: rescaled paths beyond are rejected (past the prior of the base model).
        max_outlier_ratio: peak over median speed beyond which one bad pose rules the window; rejected.
        max_raw_step_deg: a raw rotation step beyond is a pose error; rejected.
    """

    mode: RescaleMode = "unwrapped"
    fps: float = 16.0
    translation: SpeedLaw = field(default_factory=lambda: SpeedLaw(1.0, 0.4, 0.2, 1.6))
    rotation: SpeedLaw = field(default_factory=lambda: SpeedLaw(12.0, 6.0, 2.0, 30.0))
    static_rotation_deg: float = 0.02
    max_rotation_scale: float = 4.0
    max_yaw_deg: float = 75.0
    max_path_m: float = 6.0
    max_outlier_ratio: float = 8.0
    max_raw_step_deg: float = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class RescaleResult:
    """One rescaled trajectory and everything that happened to it.

    Attributes:
        trajectory: ``[F]`` float64 relative to frame 0.
        rejected: names of the guards that make the window unusable (``outlier_translation``, ``outlier_rotation``,
            ``raw_step``, ``full_turn``, ``speed``, ``yaw``, ``path``); empty when it may be used.
        adjusted: names of the guards that changed the scaling (``static_translation``, ``static_rotation``,
            ``rotation_cap``).
        scale_translation, scale_rotation: the applied s_t and s_r.
        tau_translation, tau_rotation: drawn peak speeds, m/s and deg/s.
        peak_translation, peak_rotation: measured peak speeds after rescaling, m/s and deg/s.
        path_m, yaw_deg: length and span of heading after rescaling.
    """

    trajectory: CameraTrajectory
    rejected: tuple[str, ...]
    adjusted: tuple[str, ...]
    scale_translation: float
    scale_rotation: float
    tau_translation: float
    tau_rotation: float
    peak_translation: float
    peak_rotation: float
    path_m: float
    yaw_deg: float

    @property
    def accepted(self) -> bool:
        """True when no guard rejected the window."""
        return not self.rejected


def unwrap_rotations(rotation: Tensor) -> Tensor:
    """Rotation vectors ``[F, 3]`` of ``[F, 3, 3]`` continued along the sequence: norms may pass pi.

    Each principal vector gets the multiple of 2 pi along its axis that brings it nearest to its predecessor.
    """
    principal = so3.log(rotation)
    continued = [principal[0]]
    for vector in principal[1:]:
        previous = continued[-1]
        theta = float(vector.norm())
        axis = vector / theta if theta > 1e-9 else previous / previous.norm().clamp_min(1e-12)
        turns = round((float(previous @ axis) - theta) / (2 * math.pi))
        continued.append(vector + 2 * math.pi * turns * axis)
    return torch.stack(continued)


def yaw_span_deg(trajectory: CameraTrajectory) -> float:
    """Span of the heading (direction of view in the x-z plane of frame 0), unwrapped, in degrees."""
    forward = trajectory.relative_to_first().rotation[..., 2]
    heading = np.unwrap(torch.atan2(forward[:, 0], forward[:, 2]).numpy())
    return float(np.rad2deg(heading.max() - heading.min()))


def _step_speeds(trajectory: CameraTrajectory) -> tuple[Tensor, Tensor]:
    """Metres and radians per frame, ``[F-1]`` each."""
    rotvec, step = trajectory.increments()
    return step.norm(dim=-1), rotvec.norm(dim=-1)


def _is_jitter(position: Tensor) -> bool:
    """A path that goes nowhere (net/length < 0.05) and whose steps reverse rather than flow.

    Independent position noise has step-difference energy 3 times the step energy, a smooth loop near 0.
    """
    steps = position.diff(dim=0)
    length, energy = steps.norm(dim=-1).sum(), steps.square().sum()
    if length == 0:
        return True
    return bool((position[-1] - position[0]).norm() / length < 0.05 and steps.diff(dim=0).square().sum() > energy)


def _fit_rotation_scale(vectors: Tensor, scale: float, tau: float) -> float:
    """Fixed point of ``s <- s tau / v_max(s)`` for the path ``exp(s vectors)``; tau in radians per frame.

    A path whose steps have become whole turns (tau near 2 pi) has no speed to correct; the guards judge it as it is.
    """
    for _ in range(_FIXED_POINT_STEPS):
        rotation = so3.exp(scale * vectors)
        peak = float(so3.relative_angle(rotation[:-1], rotation[1:]).max())
        if not peak or abs(peak - tau) < 1e-6 * tau:
            break
        scale *= tau / peak
    return scale


def _scales(
    raw: CameraTrajectory, step_t: float, step_r: float, settings: RescaleSettings
) -> tuple[float, float, set[str]]:
    """Eq. 12 with its guards: s_t, s_r and the names of the guards that acted. No epsilon: the guards catch zero."""
    speed_t, speed_r = _step_speeds(raw)
    adjusted: set[str] = set()
    if _is_jitter(raw.position):
        scale_t = 0.0
        adjusted.add("static_translation")
    else:
        scale_t = step_t / float(speed_t.max())
    if float(speed_r.max()) <= math.radians(settings.static_rotation_deg):
        scale_r = 1.0
        adjusted.add("static_rotation")
    else:
        scale_r = step_r / float(speed_r.max())
        if scale_r > settings.max_rotation_scale:
            scale_r = settings.max_rotation_scale
            adjusted.add("rotation_cap")
    return scale_t, scale_r, adjusted


def _apply(
    raw: CameraTrajectory, scale_t: float, scale_r: float, mode: RescaleMode, tau: float | None
) -> tuple[CameraTrajectory, float]:
    """The scaled path and the s_r it used; ``tau`` (radians per frame) asks for the fixed point of ``unwrapped``."""
    if mode == "egocentric":
        rotvec, step = raw.increments()
        return CameraTrajectory.from_increments(scale_r * rotvec, scale_t * step, raw.intrinsics), scale_r
    vectors = so3.log(raw.rotation) if mode == "paper" else unwrap_rotations(raw.rotation)
    if mode == "unwrapped" and tau is not None:
        scale_r = _fit_rotation_scale(vectors, scale_r, tau)
    pose = so3.rigid(so3.exp(scale_r * vectors), scale_t * raw.position)
    return CameraTrajectory(pose, raw.intrinsics), scale_r


def rescale(trajectory: CameraTrajectory, uniforms: Sequence[float], settings: RescaleSettings) -> RescaleResult:
    """Rescale one trajectory ``[F]`` with two uniforms in (0, 1), for the translation and the rotation speed.

    Raises:
        DataError: a batch, or fewer than 3 frames.
    """
    if trajectory.batch_shape or trajectory.num_frames < 3:
        raise DataError(f"rescale takes one trajectory of 3 or more frames, got {tuple(trajectory.c2w.shape)}")
    raw = trajectory.to("cpu", torch.float64).relative_to_first()
    tau_t, tau_r = settings.translation(uniforms[0]), settings.rotation(uniforms[1])
    step_r = math.radians(tau_r) / settings.fps
    scale_t, first_scale_r, adjusted = _scales(raw, tau_t / settings.fps, step_r, settings)
    exact = not adjusted & {"static_rotation", "rotation_cap"}
    scaled, scale_r = _apply(raw, scale_t, first_scale_r, settings.mode, step_r if exact else None)

    raw_t, raw_r = _step_speeds(raw)
    final_t, final_r = _step_speeds(scaled)
    peak_r = math.degrees(float(final_r.max())) * settings.fps
    path, yaw = float(final_t.sum()), yaw_span_deg(scaled)
    within = abs(peak_r - tau_r) <= _SPEED_TOLERANCE * tau_r if exact else peak_r <= (1 + _SPEED_TOLERANCE) * tau_r
    failures = {
        "outlier_translation": scale_t > 0 and _outlier(raw_t, settings.max_outlier_ratio),
        "outlier_rotation": "static_rotation" not in adjusted and _outlier(raw_r, settings.max_outlier_ratio),
        "raw_step": math.degrees(float(raw_r.max())) > settings.max_raw_step_deg,
        "full_turn": scale_r < _LARGEST_CORRECTION * first_scale_r,
        "speed": settings.mode != "paper" and not within,
        "yaw": yaw > settings.max_yaw_deg,
        "path": path > settings.max_path_m,
    }
    return RescaleResult(
        trajectory=scaled,
        rejected=tuple(name for name, failed in failures.items() if failed),
        adjusted=tuple(sorted(adjusted)),
        scale_translation=scale_t,
        scale_rotation=scale_r,
        tau_translation=tau_t,
        tau_rotation=tau_r,
        peak_translation=float(final_t.max()) * settings.fps,
        peak_rotation=peak_r,
        path_m=path,
        yaw_deg=yaw,
    )


def _outlier(speed: Tensor, ratio: float) -> bool:
    """True when the peak is more than ``ratio`` times the median of the frames that move at all."""
    moving = speed[speed > 1e-3 * speed.max()]
    return bool(moving.numel() and speed.max() > ratio * moving.median())
