"""The geometry reward's distances: temporally weighted translation and rotation error (Geo-Align eq. 3 and 4).

``D_trans = sum_i w_i |t_i - t*_i|`` in metres and ``D_rot = sum_i w_i angle(R_i^T R*_i)`` in radians, over the
evaluated frames, both paths relative to frame 0. The rewards are their negatives. The paper prints
``arccos((tr - 1) / 2)``; the same angle is computed by ``atan2``, which keeps its digits near 0. A rotation error ends
at pi by itself; a translation error can be bounded (:func:`translation_bound`), which the paper does not do.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry import so3

WeightKind = Literal["linear", "power", "exponential", "constant"]


def temporal_weights(
    num_frames: int,
    kind: WeightKind = "linear",
    *,
    exponent: float = 2.0,
    frame_indices: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Weights w_i of the evaluated frames: positive, summing to 1, strictly increasing (except ``constant``).

    With ``x = (i + 1) / F``: ``linear`` is x, ``power`` is ``x ** exponent``, ``exponential`` is
    ``exp(exponent * x)``, ``constant`` is 1. The paper asks for increasing weights and prints no shape; ``constant``
    is a deviation from it.

    Args:
        num_frames: F, frames of the whole video.
        exponent: > 0, used by ``power`` and ``exponential``.
        frame_indices: ``[K]`` int64 evaluated frames; the weights are renormalised over them and lie where these do,
            unless ``device`` says otherwise. None means all F.

    Returns:
        ``[F]`` or ``[K]`` float32.

    Raises:
        DataError: unknown kind, no frames, or an exponent that is not positive.
    """
    if num_frames < 1:
        raise DataError(f"temporal weights need at least one frame, got {num_frames}")
    if exponent <= 0:
        raise DataError(f"temporal weights need exponent > 0 to increase, got {exponent}")
    x = torch.arange(1, num_frames + 1, dtype=torch.float64) / num_frames
    if kind == "linear":
        weights = x
    elif kind == "power":
        weights = x**exponent
    elif kind == "exponential":
        weights = (exponent * (x - 1)).exp()
    elif kind == "constant":
        weights = torch.ones_like(x)
    else:
        raise DataError(f"unknown temporal weights {kind!r}; choose linear, power, exponential or constant")
    if frame_indices is not None:
        weights = weights.to(frame_indices.device)[frame_indices]
    return (weights / weights.sum()).to(device=device, dtype=torch.float32)


def translation_errors(estimate: Tensor, target: Tensor) -> Tensor:
    """``[B, K]`` metres between the centres of ``[B, K, 4, 4]`` poses relative to frame 0; float32."""
    return so3.safe_norm(estimate[..., :3, 3].float() - target[..., :3, 3].float())


def translation_bound(target: Tensor, factor: float) -> Tensor:
    """``[B]`` metres: ``factor`` times the largest distance of ``[B, F, 4, 4]`` poses from their frame 0, at least 1 m.

    One misread frame thus cannot outweigh all others, and a video of up to ``1 + factor`` times the asked motion along
    a straight path is scored by eq. 3 as printed.
    """
    return factor * translation_errors(target, target[..., :1, :, :]).amax(-1).clamp_min(1.0)


def translation_distance(
    estimate: Tensor, target: Tensor, weights: Tensor, bound_m: Tensor | float = math.inf
) -> Tensor:
    """Eq. 3: ``[B]`` metres from ``[B, K, 4, 4]`` poses relative to frame 0 and ``[K]`` weights; float32.

    Each frame counts at most ``bound_m`` (a number or ``[B]``).
    """
    errors = translation_errors(estimate, target)
    return (errors.minimum(torch.as_tensor(bound_m).to(errors)[..., None]) * weights).sum(-1)


def rotation_distance(estimate: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Eq. 4: ``[B]`` radians from ``[B, K, 4, 4]`` poses relative to frame 0 and ``[K]`` weights; float32, no TF32."""
    angle = so3.relative_angle(estimate[..., :3, :3].float(), target[..., :3, :3].float())
    return (angle * weights).sum(-1)
