"""CameraTrajectory: invariances, integration, validation, and the batch records built on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import RetakeBatch, SourceClip

seeds = st.integers(0, 2**32 - 1)


def random_path(seed: int, *shape: int, turn: float = 0.2) -> CameraTrajectory:
    """Random smooth-ish float64 path ``[*shape]`` (last entry frames) that starts anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    *batch, frames = shape
    start = so3.se3_exp(normal(*batch, 6))
    lens = torch.tensor([0.9, 1.6, 0.5, 0.5], dtype=torch.float64).expand(*batch, frames, 4)
    rotvec, step = turn * normal(*batch, frames - 1, 3), normal(*batch, frames - 1, 3)
    return CameraTrajectory.from_increments(rotvec, step, lens, start=start)


@settings(max_examples=30)
@given(seeds, seeds)
def test_relative_poses_ignore_the_world_frame(seed: int, other: int) -> None:
    path = random_path(seed, 2, 6)
    world = so3.se3_exp(3 * torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(other)))
    moved = path.transformed(world)
    assert torch.allclose(moved.relative_to_first().c2w, path.relative_to_first().c2w, atol=1e-12)
    for ours, theirs in zip(moved.increments(), path.increments(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.equal(path.relative_to_first().c2w[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@settings(max_examples=30)
@given(seeds)
def test_increments_integrate_back_to_the_path(seed: int) -> None:
    path = random_path(seed, 3, 7, turn=0.5)
    back = CameraTrajectory.from_increments(*path.increments(), path.intrinsics, start=path.c2w[:, 0])
    assert torch.allclose(back.c2w, path.c2w, atol=1e-12)
    assert torch.allclose(so3.compose(path.w2c, path.c2w), torch.eye(4, dtype=torch.float64), atol=1e-12)


@settings(max_examples=30)
@given(seeds, st.floats(0.1, 4), st.floats(0.1, 4))
def test_scales_compose_and_undo(seed: int, a: float, b: float) -> None:
    path = random_path(seed, 5, turn=0.1)
    twice, once = path.scale_translation(a).scale_translation(b), path.scale_translation(a * b)
    assert torch.allclose(twice.c2w, once.c2w, atol=1e-11)
    assert torch.allclose(once.path_length(), a * b * path.path_length(), rtol=1e-12)
    # Steps here stay far below pi, so scaling increments is invertible.
    turned = path.scale_rotation(a)
    assert torch.allclose(turned.scale_rotation(1 / a).c2w, path.c2w, atol=1e-11)
    assert torch.equal(turned.position, path.position)


def test_scale_accepts_one_factor_per_batch_element() -> None:
    path = random_path(0, 3, 5)
    factor = torch.tensor([0.5, 1.0, 2.0])
    assert torch.allclose(path.scale_translation(factor).path_length(), factor.double() * path.path_length())
    speed = path.scale_rotation(factor).increments()[0]
    assert torch.allclose(speed, factor.double()[:, None, None] * path.increments()[0], atol=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 17])
def test_resample_equals_scipy_slerp_and_linear(frames: int) -> None:
    path = random_path(4, 9, turn=0.4)
    resampled = path.resample(frames)
    times = np.linspace(0, 8, frames) if frames > 1 else np.zeros(1)
    oracle = Slerp(np.arange(9), Rotation.from_matrix(path.rotation.numpy()))(times).as_matrix()
    assert np.abs(resampled.rotation.numpy() - oracle).max() < 1e-12
    line = np.stack([np.interp(times, np.arange(9), path.position[:, k].numpy()) for k in range(3)], -1)
    assert np.abs(resampled.position.numpy() - line).max() < 1e-12
    assert resampled.num_frames == frames
    if frames == 9:
        assert torch.allclose(resampled.c2w, path.c2w, atol=1e-14)


def test_no_method_edits_its_object() -> None:
    path = random_path(1, 2, 5)
    before = path.c2w.clone(), path.intrinsics.clone()
    path.relative_to_first()
    path.scale_translation(2.0)
    path.scale_rotation(2.0)
    path.resample(9)
    path.transformed(torch.eye(4))
    path.with_intrinsics((1.0, 1.0, 0.5, 0.5))
    assert torch.equal(path.c2w, before[0]) and torch.equal(path.intrinsics, before[1])
    with pytest.raises(AttributeError):
        path.c2w = before[0]


def test_batch_helpers() -> None:
    single = [random_path(i, 5) for i in range(3)]
    batch = CameraTrajectory.stack(single)
    assert len(batch) == 3 and batch.batch_shape == (3,) and batch.num_frames == 5
    assert torch.equal(batch[1].c2w, single[1].c2w) and batch[1:].batch_shape == (2,)
    assert torch.equal(batch.repeat_interleave(2)[3].c2w, single[1].c2w)
    assert torch.equal(CameraTrajectory.cat([batch, batch])[4].c2w, single[1].c2w)
    assert torch.equal(batch.frames(slice(0, None, 4)).c2w, batch.c2w[:, ::4])
    assert batch.to(dtype=torch.float32).dtype == torch.float32
    with pytest.raises(IndexError):
        single[0][0]
    with pytest.raises(TypeError):
        len(single[0])


def broken(kind: str) -> tuple[torch.Tensor, object]:
    poses = random_path(2, 5).c2w.clone()
    lens: object = (0.9, 1.6, 0.5, 0.5)
    if kind == "reflection":
        poses[3, :3, 0] *= -1
    elif kind == "nan":
        poses[3, 0, 3] = math.nan
    elif kind == "scaled":
        poses[3, :3, :3] *= 1.1
    elif kind == "last row":
        poses[3, 3] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    elif kind == "shape":
        poses = poses[:, :3]
    elif kind == "dtype":
        poses = poses.half()
    elif kind == "focal":
        lens = (0.0, 1.6, 0.5, 0.5)
    elif kind == "lens shape":
        lens = torch.ones(4, 4)
    elif kind == "lens nan":
        lens = (math.nan, 1.6, 0.5, 0.5)
    return poses, lens


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reflection", "frame 3: reflection"),
        ("nan", "frame 3: NaN"),
        ("scaled", "frame 3: 3x3 part is not a rotation"),
        ("last row", "frame 3: last row"),
        ("shape", r"\[..., frames, 4, 4\]"),
        ("dtype", "float32 or float64"),
        ("focal", "focal length"),
        ("lens shape", "file.json"),
        ("lens nan", "NaN or infinite intrinsics"),
    ],
)
def test_outside_data_is_refused_with_the_reason(kind: str, words: str) -> None:
    poses, lens = broken(kind)
    with pytest.raises(DataError, match=words) as caught:
        CameraTrajectory.validated(poses, lens, name="file.json")  # type: ignore[arg-type]
    assert "file.json" in str(caught.value)


def test_validation_repairs_printed_digits_only() -> None:
    path = random_path(3, 20)
    rounded = torch.round(path.c2w, decimals=5)
    repaired = CameraTrajectory.validated(rounded)
    gram = so3.matmul(repaired.rotation.transpose(-1, -2), repaired.rotation)
    assert (gram - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-14
    # Each of 9 entries is off by at most 5e-6.
    assert so3.relative_angle(repaired.rotation, path.rotation).max() < 5e-6 * 3 * math.sqrt(2)


def test_retake_batch_selects_and_repeats_consistently() -> None:
    camera = CameraTrajectory.stack([random_path(i, 5) for i in range(3)])
    video = torch.arange(3.0)[:, None, None, None, None].expand(3, 5, 3, 2, 2)
    plane = torch.arange(12.0).view(3, 4)
    batch = RetakeBatch(SourceClip(video, camera, plane, ("a", "b", "c")), camera, ("x", "y", "z"))
    group = batch.repeat_interleave(2)
    assert group.prompts == ("x", "x", "y", "y", "z", "z") and group.source.clip_ids[2:4] == ("b", "b")
    assert torch.equal(group.source.video[2], video[1]) and torch.equal(group.target_camera.c2w[5], camera.c2w[2])
    picked = batch.select([2, 0])
    assert picked.prompts == ("z", "x") and torch.equal(picked.source.ground_plane, plane[[2, 0]])
    assert len(batch.to("cpu")) == 3
    without_plane = RetakeBatch(SourceClip(video, camera, None, ("a", "b", "c")), camera, ("x", "y", "z"))
    assert without_plane.repeat_interleave(2).source.ground_plane is None
    with pytest.raises(DataError, match="prompts 2"):
        RetakeBatch(batch.source, camera, ("x", "y"))
    with pytest.raises(DataError, match="ids 1"):
        SourceClip(video, camera, plane, ("a",))
