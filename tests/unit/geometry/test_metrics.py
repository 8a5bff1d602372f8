"""Alignment and camera errors against scipy, hand-computed cases and the documented behaviour of the public scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from geoalign.errors import DataError
from geoalign.geometry import metrics, so3
from geoalign.geometry.align import align, umeyama
from geoalign.geometry.presets import PRESETS, preset
from geoalign.geometry.trajectory import CameraTrajectory

seeds = st.integers(0, 2**32 - 1)


def random_path(seed: int, *shape: int) -> CameraTrajectory:
    generator = torch.Generator().manual_seed(seed)
    twist = torch.randn(*shape, 6, dtype=torch.float64, generator=generator)
    return CameraTrajectory.build(so3.se3_exp(twist))


def at(positions: torch.Tensor) -> CameraTrajectory:
    """A path of unrotated cameras at ``[F, 3]``."""
    rotation = torch.eye(3, dtype=torch.float64).expand(len(positions), 3, 3)
    return CameraTrajectory.build(so3.rigid(rotation, positions.double()))


def dolly(metres: float, frames: int = 81) -> CameraTrajectory:
    z = torch.linspace(0, metres, frames, dtype=torch.float64)
    return at(torch.stack((0 * z, 0 * z, z), -1))


@settings(max_examples=30)
@given(seeds, st.floats(0.05, 20))
def test_sim3_undoes_a_random_similarity(seed: int, scale: float) -> None:
    path = random_path(seed, 3, 8)
    motion = so3.se3_exp(torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed ^ 1)))
    moved = path.transformed(motion)
    origin = torch.zeros(3, 1, 3, dtype=torch.float64)
    stretched = CameraTrajectory(so3.rigid(moved.rotation, origin + scale * moved.position), moved.intrinsics)
    aligned, fitted = align(stretched, path, "sim3")
    # SVD of a 3x3 covariance: eps * condition; random clouds of 8 points are well conditioned.
    assert torch.allclose(aligned.c2w, path.c2w, atol=1e-8)
    assert torch.allclose(fitted, torch.full((3,), 1 / scale, dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(align(moved, path, "se3")[0].c2w, path.c2w, atol=1e-8)
    assert metrics.sim3_translation_error(stretched, path).max() < 1e-8


def test_umeyama_rotation_equals_scipy_and_never_reflects() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    target = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    fit = umeyama(points, target)
    p, t = (points - points.mean(0)).numpy(), (target - target.mean(0)).numpy()
    oracle, _ = Rotation.align_vectors(t, p)
    assert np.abs(fit.rotation.numpy() - oracle.as_matrix()).max() < 1e-10
    # Given the rotation, the least-squares scale is <t, R p> / <p, p>.
    scale = (t * (p @ oracle.as_matrix().T)).sum() / (p * p).sum()
    assert abs(float(fit.scale) - scale) < 1e-12
    mirrored = umeyama(points, points * torch.tensor([1.0, 1.0, -1.0]))
    assert abs(float(torch.linalg.det(mirrored.rotation)) - 1) < 1e-12
    assert float(umeyama(points, target, with_scale=False).scale) == 1


def test_first_frame_alignment_moves_rigidly() -> None:
    path, other = random_path(1, 2, 6), random_path(2, 2, 6)
    aligned, scale = align(other, path, "first")
    assert torch.allclose(aligned.c2w[:, 0], path.c2w[:, 0], atol=1e-12)
    assert torch.allclose(aligned.relative_to_first().c2w, other.relative_to_first().c2w, atol=1e-11)
    assert (scale == 1).all() and torch.equal(align(other, path, "none")[0].c2w, other.c2w)
    with pytest.raises(DataError, match="equal batch and frames"):
        align(other, path.frames([0, 1]), "first")
    with pytest.raises(DataError, match="unknown alignment"):
        align(other, path, "affine")  # type: ignore[arg-type]


@settings(max_examples=20)
@given(seeds)
def test_metric_errors_ignore_the_world_frame_of_either_path(seed: int) -> None:
    a, b = random_path(seed, 6), random_path(seed ^ 3, 6)
    motion = so3.se3_exp(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    for metric in (
        metrics.rotation_error_deg,
        metrics.translation_error_m,
        metrics.path_length_ratio,
        metrics.translation_gain,
        metrics.paired_rotation_error_deg,
    ):
        assert torch.allclose(metric(a.transformed(motion), b), metric(a, b), rtol=1e-9, atol=1e-9)
        assert torch.allclose(metric(a, b.transformed(motion)), metric(a, b), rtol=1e-9, atol=1e-9)


def test_metric_errors_in_hand_computed_cases() -> None:
    target, half = dolly(2.0), dolly(1.0)
    error = metrics.translation_error_m(half, target)
    assert torch.allclose(error, torch.linspace(0, 1, 81, dtype=torch.float64), atol=1e-12)
    assert metrics.rotation_error_deg(half, target).max() == 0
    assert abs(float(metrics.scale_ratio(half, target)) - 0.5) < 1e-12
    assert abs(float(metrics.translation_gain(half, target)) - 0.5) < 1e-12
    assert abs(float(metrics.translation_gain(dolly(-2.0), target)) + 1) < 1e-12
    pan, still = preset("pan_right", dtype=torch.float64), CameraTrajectory.identity(81, dtype=torch.float64)
    error = metrics.rotation_error_deg(still, pan)
    # 20 degrees at constant speed; the published camera reaches 80/80.5 of it.
    assert abs(float(error[-1]) - 20 * 80 / 80.5) < 1e-3 and error[0] == 0
    assert math.isnan(float(metrics.scale_ratio(dolly(1.0), pan)))
    assert math.isnan(float(metrics.translation_gain(dolly(1.0), pan)))


def test_gain_is_blind_to_jitter_and_path_length_is_not() -> None:
    target = dolly(2.0)
    noise = 0.02 * torch.randn(81, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = at(target.position + noise - noise[0])
    assert abs(float(metrics.translation_gain(noisy, target)) - 1) < 0.03
    assert float(metrics.path_length_ratio(noisy, target)) > 1.5


def test_pose_error_names_the_scale_it_removed() -> None:
    result = metrics.pose_error(dolly(1.0), dolly(2.0), alignment="sim3")
    assert abs(float(result.scale) - 2) < 1e-9 and result.translation_m.max() < 1e-9
    assert metrics.pose_error(dolly(1.0), dolly(2.0)).translation_m[-1] == 1


def test_public_rotation_error_equals_its_definition() -> None:
    estimate, target = random_path(5, 7), random_path(6, 7)
    r, g = estimate.rotation.numpy(), target.rotation.numpy()
    total = 0.0
    for i in range(7):
        for j in range(7):
            if i != j:
                pair = (g[i].T @ g[j]).T @ (r[i].T @ r[j])
                total += math.degrees(math.acos(max(-1.0, min(1.0, (np.trace(pair) - 1) / 2))))
    assert abs(float(metrics.paired_rotation_error_deg(estimate, target)) - total / 42) < 1e-7


def test_public_rotation_error_of_an_ignored_pan() -> None:
    still = CameraTrajectory.identity(81, dtype=torch.float64)
    error = float(metrics.paired_rotation_error_deg(still, preset("pan_right", dtype=torch.float64)))
    # Mean of |i - j| over ordered pairs of 81 frames is 82/3 steps of 20/80.5 degrees: 6.79, far below 20.
    assert abs(error - 82 / 3 * 20 / 80.5) < 1e-3


def test_public_translation_error_is_blind_as_documented() -> None:
    target = dolly(2.0)
    assert float(metrics.sim3_translation_error(dolly(0.2), target)) < 1e-7
    assert float(metrics.sim3_translation_error(dolly(-2.0), target)) < 1e-7
    sideways = at(target.position.roll(1, -1))
    assert float(metrics.sim3_translation_error(sideways, target)) < 1e-7
    stops = at(target.position.clamp(max=1.0))
    assert abs(float(metrics.sim3_translation_error(stops, target)) - 0.108) < 1e-3
    jitter = 1e-3 * torch.randn(81, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert 0.2 < float(metrics.sim3_translation_error(at(jitter), target)) < 0.26
    still = CameraTrajectory.identity(81, dtype=torch.float64)
    assert math.isnan(float(metrics.sim3_translation_error(still, target)))
    for name in PRESETS[:4]:  # pans and tilts do not translate
        assert float(metrics.sim3_translation_error(at(jitter), preset(name, dtype=torch.float64))) == 0
