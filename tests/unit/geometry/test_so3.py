"""Rotations and rigid motions against scipy, RoMa, matrix exponentials and their own inverses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import roma
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from geoalign.geometry import so3

# Angles where naive forms break: zero, denormal squares, the series switch at 0.3, and both sides of pi.
ANGLES = (0.0, 1e-20, 1e-8, 1e-4, 1e-2, 0.2999, 0.3001, 1.0, 2.0, 3.0, math.pi - 1e-4, math.pi - 1e-9)
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
axes = hnp.arrays(np.float64, 3, elements=st.floats(-1, 1, width=32)).filter(lambda a: np.linalg.norm(a) > 1e-3)


def vectors(angle: float, dtype: torch.dtype = torch.float64, count: int = 64) -> torch.Tensor:
    axis = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (axis / axis.norm(dim=-1, keepdim=True) * angle).to(dtype)


@pytest.mark.parametrize("angle", ANGLES)
def test_exp_and_log_equal_scipy(angle: float) -> None:
    rotvec = vectors(angle)
    oracle = Rotation.from_rotvec(rotvec.numpy())
    # Sines and cosines of both sides are correctly rounded to a few eps; 1e-14 is 50 eps of the largest entry.
    assert np.abs(so3.exp(rotvec).numpy() - oracle.as_matrix()).max() < 1e-14
    # log has condition number 1 up to pi, where scipy itself goes through the same quaternion.
    matrix = torch.from_numpy(oracle.as_matrix())
    assert np.abs(so3.log(matrix).numpy() - oracle.as_rotvec()).max() < 2e-14
    assert (so3.angle(matrix) - angle).abs().max() < 2e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", ANGLES)
def test_log_undoes_exp(angle: float, dtype: torch.dtype) -> None:
    rotvec = vectors(angle, dtype)
    error = (so3.log(so3.exp(rotvec)) - rotvec).norm(dim=-1)
    # At pi the sign is free: rounding may carry the angle across, so compare rotations there instead.
    near_pi = math.pi - angle < 1e-5
    error = torch.where(error > 1, (so3.log(so3.exp(rotvec)) + rotvec).norm(dim=-1), error) if near_pi else error
    # 10 roundings of entries of size 1, amplified by at most pi.
    assert error.max() <= 10 * math.pi * EPS[dtype]
    # Relative accuracy is kept for small angles: no cancellation anywhere.
    if 0 < angle <= 1e-2:
        assert (error / angle).max() <= 10 * EPS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", ANGLES)
def test_gradients_are_finite_everywhere(angle: float, dtype: torch.dtype) -> None:
    rotvec = vectors(angle, dtype).requires_grad_()
    rotation = so3.exp(rotvec)
    twist = so3.se3_log(so3.se3_exp(torch.cat((rotvec + 0.5, rotvec), -1)))
    total = so3.log(rotation).sum() + so3.angle(rotation).sum() + twist.sum()
    (gradient,) = torch.autograd.grad(total, rotvec)
    assert torch.isfinite(gradient).all()
    # Every map here is smooth with derivative of order one (angle has slope 1); nothing may blow up near 0 or pi.
    assert gradient.abs().max() < 20


@pytest.mark.parametrize("angle", [1e-3, 0.25, 0.31, 1.0, 2.5, 3.1])
def test_gradients_equal_finite_differences(angle: float) -> None:
    rotvec = vectors(angle, count=3).requires_grad_()
    assert torch.autograd.gradcheck(so3.exp, rotvec)
    assert torch.autograd.gradcheck(lambda v: so3.log(so3.exp(v)), rotvec)
    assert torch.autograd.gradcheck(lambda v: so3.angle(so3.exp(v)), rotvec)
    twist = torch.cat((rotvec.detach() + 1, rotvec.detach()), -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: so3.se3_log(so3.se3_exp(x)), twist)


def test_quaternions_equal_roma_and_scipy_in_xyzw() -> None:
    rotation = roma.random_rotmat(200, dtype=torch.float64)
    half_turns = so3.exp(vectors(math.pi))
    for matrix in (rotation, half_turns):
        quaternion = so3.quaternion_from_matrix(matrix)
        ours, theirs = quaternion.numpy(), Rotation.from_matrix(matrix.numpy()).as_quat()
        assert np.minimum(np.abs(ours - theirs).max(-1), np.abs(ours + theirs).max(-1)).max() < 1e-13
        assert (quaternion[:, 3] >= 0).all()
        assert (so3.matrix_from_quaternion(3 * quaternion) - matrix).abs().max() < 1e-14
    assert (so3.log(rotation) - roma.rotmat_to_rotvec(rotation)).abs().max() < 1e-13
    assert (so3.matrix_from_quaternion(so3.quaternion_from_matrix(rotation)) - rotation).abs().max() < 1e-14


def test_se3_exp_equals_the_matrix_exponential() -> None:
    for angle in ANGLES:
        rotvec = vectors(angle, count=8)
        rho = vectors(2.0, count=8).flip(-1)
        generator = torch.zeros(8, 4, 4, dtype=torch.float64)
        generator[:, :3, :3], generator[:, :3, 3] = so3.hat(rotvec), rho
        twist = torch.cat((rho, rotvec), -1)
        # matrix_exp is a scaled Taylor polynomial accurate to about 1e-14 for norms below 4.
        assert (so3.se3_exp(twist) - torch.linalg.matrix_exp(generator)).abs().max() < 5e-14
        if angle < math.pi - 1e-6:
            assert (so3.se3_log(so3.se3_exp(twist)) - twist).abs().max() < 1e-12


def test_float32_angle_keeps_digits_where_arccos_has_none() -> None:
    for degrees in (0.001, 0.01, 0.05, 0.25, 90.0, 179.0):
        rotation = so3.exp(vectors(math.radians(degrees), torch.float64)).float()
        error = torch.rad2deg(so3.angle(rotation)) - degrees
        # Entries carry 6e-8 of rounding each; in degrees that is 57.3 * 6e-8 * sqrt(6) = 8e-6.
        assert error.abs().max() < 1e-5 + 2e-7 * degrees


@settings(max_examples=60)
@given(axes, axes, st.floats(0, 3.1), st.floats(0, 3.1))
def test_relative_angle_is_a_bi_invariant_metric(a: np.ndarray, b: np.ndarray, x: float, y: float) -> None:
    r = so3.exp(torch.from_numpy(a / np.linalg.norm(a) * x))
    s = so3.exp(torch.from_numpy(b / np.linalg.norm(b) * y))
    left = so3.relative_angle(so3.matmul(s, r), s)
    assert abs(float(so3.angle(r)) - x) < 1e-12
    assert abs(float(left - so3.relative_angle(r, torch.eye(3, dtype=torch.float64)))) < 1e-12
    assert abs(float(so3.relative_angle(r, s) - so3.relative_angle(s, r))) < 1e-12


@settings(max_examples=60)
@given(axes, axes, st.floats(0, 3.1))
def test_rigid_algebra_agrees_with_linear_algebra(a: np.ndarray, t: np.ndarray, x: float) -> None:
    pose = so3.se3_exp(torch.from_numpy(np.concatenate((t, a / np.linalg.norm(a) * x))))
    assert (so3.invert_rigid(pose) - torch.linalg.inv(pose)).abs().max() < 1e-12
    assert (so3.compose(pose, so3.invert_rigid(pose)) - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-14
    assert (so3.compose(pose, pose) - pose @ pose).abs().max() < 1e-14


def test_projection_returns_the_nearest_rotation() -> None:
    rotation = roma.random_rotmat(50, dtype=torch.float64)
    noisy = rotation + 1e-3 * torch.randn(50, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    projected = so3.project(noisy)
    assert (projected - roma.special_procrustes(noisy)).abs().max() < 1e-12
    assert (torch.linalg.det(projected) - 1).abs().max() < 1e-12
    assert (so3.project(-torch.eye(3, dtype=torch.float64)).det() - 1).abs() < 1e-12


def test_interpolation_is_constant_speed_and_hits_both_ends() -> None:
    a, b = roma.random_rotmat(20, dtype=torch.float64), roma.random_rotmat(20, dtype=torch.float64)
    steps = torch.linspace(0, 1, 11, dtype=torch.float64)
    path = so3.interpolate(a[:, None], b[:, None], steps.expand(20, 11))
    assert (path[:, 0] - a).abs().max() < 1e-14 and (path[:, -1] - b).abs().max() < 1e-12
    speed = so3.relative_angle(path[:, :-1], path[:, 1:])
    assert (speed - so3.relative_angle(a, b)[:, None] / 10).abs().max() < 1e-12
