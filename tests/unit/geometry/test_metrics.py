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
from geoalign.geometry.align import umeyama
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
def test_the_fit_undoes_a_random_similarity(seed: int, scale: float) -> None:
    path = random_path(seed, 3, 8)
    motion = so3.se3_exp(torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed ^ 1)))
    moved = path.transformed(motion)
    stretched = CameraTrajectory(so3.rigid(moved.rotation, scale * moved.position), moved.intrinsics)
    fit = umeyama(stretched.position, path.position)
    # SVD of a 3x3 covariance: eps * condition; random clouds of 8 points are well conditioned.
    assert torch.allclose(fit.apply_points(stretched.position), path.position, atol=1e-8)
    assert torch.allclose(fit.rotation, so3.invert_rigid(motion)[:, :3, :3], atol=1e-8)
    assert torch.allclose(fit.scale, torch.full((3,), 1 / scale, dtype=torch.float64), rtol=1e-9)
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
    with pytest.raises(DataError, match="frames differ"):
        umeyama(points, target[:5])


@settings(max_examples=20)
@given(seeds)
def test_metric_errors_ignore_the_world_frame_of_either_path(seed: int) -> None:
    a, b = random_path(seed, 6), random_path(seed ^ 3, 6)
    motion = so3.se3_exp(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    for metric in (
        metrics.rotation_error_deg,
        metrics.translation_error_m,
        metrics.scale_ratio,
        metrics.translation_gain,
        metrics.paired_rotation_error_deg,
    ):
        assert torch.allclose(metric(a.transformed(motion), b), metric(a, b), rtol=1e-9, atol=1e-9)
        assert torch.allclose(metric(a, b.transformed(motion)), metric(a, b), rtol=1e-9, atol=1e-9)


def test_metric_errors_in_hand_computed_cases() -> None:
    target, half = dolly(2.0), dolly(1.0)
    distances = metrics.position_distances_m(half, target)
    assert torch.allclose(distances, torch.linspace(0, 1, 81, dtype=torch.float64), atol=1e-12)
    # Frames 1..80 are 1/80, 2/80, ... 1 m behind.
    assert abs(float(metrics.translation_error_m(half, target)) - 81 / 160) < 1e-12
    assert metrics.rotation_error_deg(half, target) == 0
    assert abs(float(metrics.scale_ratio(half, target)) - 0.5) < 1e-12
    assert abs(float(metrics.translation_gain(half, target)) - 0.5) < 1e-12
    assert abs(float(metrics.translation_gain(dolly(-2.0), target)) + 1) < 1e-12
    assert abs(float(metrics.translation_error_m(dolly(20.0), target)) - 18 * 81 / 160) < 1e-12  # no upper bound
    pan, still = preset("pan_right", dtype=torch.float64), CameraTrajectory.identity(81, dtype=torch.float64)
    angles = metrics.view_angles_deg(still, pan)
    # 20 degrees at constant speed; the published camera reaches 80/80.5 of it.
    assert abs(float(angles[-1]) - 20 * 80 / 80.5) < 1e-3 and angles[0] == 0
    assert abs(float(metrics.rotation_error_deg(still, pan)) - 20 * 81 / 2 / 80.5) < 1e-3
    assert math.isnan(float(metrics.scale_ratio(dolly(1.0), pan)))
    assert math.isnan(float(metrics.translation_gain(dolly(1.0), pan)))


def test_scale_ratio_and_gain_differ_on_a_path_with_a_corner() -> None:
    # Asked: 1 m forward, 1 m right. Flown: 1 m forward, and back again.
    forward, right = torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0])
    target, flown = (
        at(torch.stack((0 * right, forward, forward + right))),
        at(torch.stack((0 * right, forward, 0 * right))),
    )
    assert float(metrics.scale_ratio(flown, target)) == 1  # 2 m of 2 m
    assert abs(float(metrics.translation_gain(flown, target)) - 1 / 3) < 1e-12  # (1 + 0) / (1 + 2)


def test_gain_is_blind_to_jitter_and_scale_ratio_is_not() -> None:
    target = dolly(2.0)
    noise = 0.02 * torch.randn(81, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = at(target.position + noise - noise[0])
    assert abs(float(metrics.translation_gain(noisy, target)) - 1) < 0.03
    assert float(metrics.scale_ratio(noisy, target)) > 1.5


def test_all_errors_of_a_subset_of_frames_equal_numpy_and_scipy() -> None:
    frames = torch.tensor([0, 2, 3, 6])
    path, estimate = random_path(11, 2, 7), random_path(12, 2, 4)
    found = metrics.camera_errors(estimate.c2w, path, frames)
    assert tuple(found) == metrics.CAMERA_METRICS
    for b in range(2):
        e, g = (np.linalg.inv(c[0]) @ c for c in (estimate.c2w[b].numpy(), path.c2w[b, frames].numpy()))
        p, t = e[:, :3, 3], g[:, :3, 3]
        turn = Rotation.from_matrix(e[:, :3, :3]).inv() * Rotation.from_matrix(g[:, :3, :3])
        lengths = [np.linalg.norm(np.diff(x, axis=0), axis=1).sum() for x in (p, t)]
        oracle, _ = Rotation.align_vectors(t - t.mean(0), p - p.mean(0))
        turned = oracle.apply(p - p.mean(0))
        fitted = (turned * (t - t.mean(0))).sum() / (turned**2).sum() * turned
        residual = np.linalg.norm(fitted - (t - t.mean(0)), axis=1).mean()
        pairs = [
            Rotation.from_matrix((g[i].T @ g[j])[:3, :3].T @ (e[i].T @ e[j])[:3, :3]).magnitude()
            for e, g in ((e[:, :3, :3], g[:, :3, :3]),)
            for i in range(4)
            for j in range(4)
            if i != j
        ]
        expected = {
            "translation_error_m": np.linalg.norm(p - t, axis=1)[1:].mean(),
            "rotation_error_deg": np.degrees(turn.magnitude()[1:].mean()),
            "scale_ratio": lengths[0] / lengths[1],
            "translation_gain": np.linalg.lstsq(t.reshape(-1, 1), p.ravel(), rcond=None)[0][0],
            "rot_err_deg": np.degrees(np.mean(pairs)),
            "trans_err": residual / max(np.linalg.norm(a - b) for a in t for b in t),
        }
        assert {name: float(value[b]) for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_undefined_errors_are_nan_and_leave_the_other_videos_alone() -> None:
    still = CameraTrajectory.identity(5, dtype=torch.float64)
    target = CameraTrajectory.stack([dolly(2.0, 5), still, dolly(2.0, 5)])
    estimate = torch.stack(
        [dolly(1.0, 5).c2w, dolly(1.0, 5).c2w, torch.full((5, 4, 4), torch.nan, dtype=torch.float64)]
    )
    found = metrics.camera_errors(estimate, target)
    defined = {name: torch.isfinite(value).tolist() for name, value in found.items()}
    moving_only = ("scale_ratio", "translation_gain", "trans_err")
    assert defined == {name: [True, name not in moving_only, False] for name in metrics.CAMERA_METRICS}
    # 0.25, 0.5, 0.75 and 1 m behind, or ahead of a camera that should stand still.
    assert found["translation_error_m"][:2].tolist() == [0.625, 0.625]


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
