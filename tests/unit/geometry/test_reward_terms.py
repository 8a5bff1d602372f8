"""Eq. 3 and 4: weights, hand-computed distances, float32 accuracy and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.reward_terms import rotation_distance, temporal_weights, translation_bound, translation_distance


@pytest.mark.parametrize("kind", ["linear", "power", "exponential", "constant"])
@pytest.mark.parametrize("frames", [1, 2, 9, 81])
def test_weights_sum_to_one_and_increase(kind: str, frames: int) -> None:
    weights = temporal_weights(frames, kind)  # type: ignore[arg-type]
    assert weights.shape == (frames,) and (weights > 0).all()
    assert abs(float(weights.double().sum()) - 1) < 1e-6
    steps = weights.diff()
    assert (steps == 0).all() if kind == "constant" else (steps > 0).all()


def test_weight_values() -> None:
    assert torch.allclose(temporal_weights(4), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.allclose(temporal_weights(2, "power", exponent=2), torch.tensor([0.2, 0.8]))
    ratio = temporal_weights(10, "exponential", exponent=3)
    assert abs(float(ratio[1] / ratio[0]) - math.exp(0.3)) < 1e-5
    subset = temporal_weights(4, frame_indices=torch.tensor([0, 3]))
    assert torch.allclose(subset, torch.tensor([0.2, 0.8]))


@pytest.mark.parametrize("arguments", [{"kind": "cubic"}, {"num_frames": 0}, {"kind": "power", "exponent": 0.0}])
def test_unusable_weights_are_refused(arguments: dict) -> None:
    with pytest.raises(DataError):
        temporal_weights(**{"num_frames": 5, **arguments})


def poses(angles_deg: list[float], metres: list[float]) -> torch.Tensor:
    rotvec = torch.deg2rad(torch.tensor(angles_deg, dtype=torch.float64))[:, None] * torch.tensor([0.0, 1.0, 0.0])
    translation = torch.tensor(metres, dtype=torch.float64)[:, None] * torch.tensor([0.6, 0.0, 0.8])
    return so3.rigid(so3.exp(rotvec.double()), translation)[None]


def test_distances_in_hand_computed_cases() -> None:
    weights = temporal_weights(4)
    target = poses([0, 10, 20, 30], [0, 1, 2, 3])
    estimate = poses([0, 5, 10, 15], [0, 0.5, 1, 1.5])
    assert abs(float(translation_distance(estimate, target, weights)) - (0.2 * 0.5 + 0.3 * 1 + 0.4 * 1.5)) < 1e-6
    expected = math.radians(0.2 * 5 + 0.3 * 10 + 0.4 * 15)
    assert abs(float(rotation_distance(estimate, target, weights)) - expected) < 1e-6
    assert float(translation_distance(target, target, weights)) == 0
    assert float(rotation_distance(target, target, weights)) < 1e-7


def test_the_bound_follows_the_targets_reach() -> None:
    """Out to 3 m and back to 1 m: four times 3 m. A camera that stays within 1 m counts as one of 1 m."""
    paths = torch.cat([poses([0, 0, 0, 0], [0, 2, -3, 1]), poses([0, 0, 0, 0], [0, 0.1, 0.2, 0.3])]).float()
    torch.testing.assert_close(translation_bound(paths, 4.0), torch.tensor([12.0, 4.0]))
    moved = paths.clone()
    moved[:, :, :3, 3] += torch.tensor([5.0, -2.0, 1.0])  # of the distance from the first frame, wherever that is
    torch.testing.assert_close(translation_bound(moved, 4.0), torch.tensor([12.0, 4.0]))
    assert translation_bound(paths, math.inf).isinf().all()
    far = poses([0, 0, 0, 180], [0, 2, -3, 100]).float()
    weights, bound = temporal_weights(4), translation_bound(paths[:1], 4.0)
    # Only the last frame, 99 m away, reaches it; half a turn is the largest angle and counts in full.
    torch.testing.assert_close(translation_distance(far, paths[:1], weights, bound), torch.tensor([0.4 * 12.0]))
    torch.testing.assert_close(translation_distance(far, paths[:1], weights), torch.tensor([0.4 * 99.0]))
    torch.testing.assert_close(rotation_distance(far, paths[:1], weights), torch.tensor([0.4 * math.pi]))


def test_tiny_rotations_survive_float32() -> None:
    weights = temporal_weights(3)
    target, estimate = poses([0, 0, 0], [0, 0, 0]), poses([0.01, 0.01, 0.01], [0, 0, 0])
    measured = math.degrees(float(rotation_distance(estimate.float(), target.float(), weights)))
    assert abs(measured - 0.01) < 1e-5  # arccos in float32 returns 0 or 0.02 here


def test_gradient_is_finite_at_a_perfect_estimate() -> None:
    target = poses([0, 10, 180], [0, 1, 2]).float()
    estimate = target.clone().requires_grad_()
    weights = temporal_weights(3)
    (translation_distance(estimate, target, weights) + rotation_distance(estimate, target, weights)).sum().backward()
    assert torch.isfinite(estimate.grad).all()
