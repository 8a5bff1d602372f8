"""Sizes of the resize and the crop; pose maths against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from geoalign.errors import UsageError
from geoalign.evaluators.mapanything.poses import quaternion_to_rotation, relative_to_first, small_matmul
from geoalign.frozen.mapanything_images import plan_resize


def test_plan_of_the_paper_size() -> None:
    plan = plan_resize(480, 832)
    assert (plan.resized, plan.output, plan.offset) == ((298, 518), (294, 518), (2, 0))


@given(st.integers(20, 1200), st.integers(20, 1200))
def test_plan_covers_and_crops_the_centre(height: int, width: int) -> None:
    plan = plan_resize(height, width)
    assert max(plan.output) == 518 and plan.output[0] % 14 == plan.output[1] % 14 == 0
    for source, resized, output, offset in zip(plan.source, plan.resized, plan.output, plan.offset, strict=True):
        assert 0 <= offset <= resized - output
        assert abs(2 * offset - (resized - output)) <= 1
        assert resized <= source * max(plan.output[0] / height, plan.output[1] / width) + 1e-3
    assert any(r == o for r, o in zip(plan.resized, plan.output, strict=True))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="0 x 5"):
        plan_resize(0, 5)


def quaternions(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, rng=np.random.default_rng(seed)).as_quat()).float()


def test_quaternion_to_rotation_equals_scipy() -> None:
    unit = quaternions(200)
    expected = torch.from_numpy(Rotation.from_quat(unit.double().numpy()).as_matrix())
    # Entries are sums of a few products of numbers below 1: a handful of float32 roundings of 6e-8.
    torch.testing.assert_close(quaternion_to_rotation(unit).double(), expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(quaternion_to_rotation(-3 * unit).double(), expected, rtol=0, atol=5e-7)


def test_poses_relative_to_first_equal_scipy() -> None:
    quaternion = quaternions(10, seed=3).view(2, 5, 4)
    translation = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    c2w = relative_to_first(quaternion, translation)
    assert torch.equal(c2w[:, 0], torch.eye(4).expand(2, 4, 4))
    assert torch.equal(c2w[..., 3, :], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(2, 5, 4))
    for scene in range(2):
        world = Rotation.from_quat(quaternion[scene].double().numpy())
        turned = (world[0].inv() * world).as_matrix()
        moved = world[0].inv().apply((translation[scene] - translation[scene, 0]).double().numpy())
        torch.testing.assert_close(c2w[scene, :, :3, :3].double(), torch.from_numpy(turned), rtol=0, atol=1e-6)
        torch.testing.assert_close(c2w[scene, :, :3, 3].double(), torch.from_numpy(moved), rtol=0, atol=3e-6)


def test_relative_poses_ignore_the_network_frame() -> None:
    """Moving every camera by one rigid motion changes nothing: what the network calls its world does not matter."""
    quaternion, translation = quaternions(6, seed=5), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    turn = Rotation.from_euler("xyz", [20, -35, 70], degrees=True)
    world = (turn * Rotation.from_quat(quaternion.double().numpy())).as_quat()
    moved = turn.apply(translation.double().numpy()) + np.array([4.0, -2.0, 1.0])
    again = relative_to_first(torch.from_numpy(world).float(), torch.from_numpy(moved).float())
    torch.testing.assert_close(again, relative_to_first(quaternion, translation), rtol=0, atol=5e-6)


def test_small_angles_survive_float32() -> None:
    """0.001 degrees between two large rotations is read back to 1%, which a bf16 or TF32 product would lose."""
    base = Rotation.from_euler("xyz", [80, 30, -50], degrees=True)
    near = base * Rotation.from_rotvec([0, math.radians(1e-3), 0])
    both = torch.from_numpy(np.stack([base.as_quat(), near.as_quat()]))
    rotation = quaternion_to_rotation(both.double())
    relative = small_matmul(rotation[0].T, rotation[1])
    assert math.degrees(relative[0, 2].item()) == pytest.approx(1e-3, rel=1e-6)
    c2w = relative_to_first(both.float(), torch.zeros(2, 3))
    # float32 quaternions carry 6e-8 rad each, 3.4e-6 degrees; a few of them stay within 2% of 1e-3 degrees.
    assert math.degrees(c2w[1, 0, 2].item()) == pytest.approx(1e-3, rel=0.02)
