"""Pluecker maps, ReDirector's camera vectors and the plane-induced warp, each against a per-pixel derivation."""

from __future__ import annotations

import pytest
import torch

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.pluecker import camera_vectors, fit_focal, pack_frames, ray_map
from geoalign.geometry.trajectory import CameraTrajectory


def sample(*shape: int) -> CameraTrajectory:
    twist = 0.3 * torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return CameraTrajectory.build(so3.se3_exp(twist), (0.9, 1.5, 0.5, 0.5))


def test_ray_map_equals_the_definition_at_every_pixel() -> None:
    camera, (height, width) = sample(2, 5), (6, 10)
    maps = ray_map(camera, (height, width), reference_size=None)
    assert maps.shape == (2, 5, 6, height, width)
    for row in range(height):
        for column in range(width):
            local = torch.tensor([(column + 0.5 - 5) / 9.0, (row + 0.5 - 3) / 9.0, 1.0], dtype=torch.float64)
            direction = camera.rotation @ (local / local.norm())
            moment = torch.linalg.cross(camera.position, direction)
            expected = torch.cat((moment, direction), -1)
            assert torch.allclose(maps[..., row, column], expected, atol=1e-14)


def test_ray_map_does_not_edit_its_input_and_names_the_reference_size() -> None:
    camera = sample(5)
    before = camera.intrinsics.clone()
    first = ray_map(camera, (480 // 16, 832 // 16), reference_size=(1280, 1280))
    second = ray_map(camera, (480 // 16, 832 // 16), reference_size=(1280, 1280))
    assert torch.equal(first, second) and torch.equal(camera.intrinsics, before)
    # A square sensor's focal f (of its width) becomes f * 832 pixels in both directions after the crop to 480 x 832.
    lens = torch.tensor([1.2, 1.2, 0.5, 0.5], dtype=torch.float64)
    assert torch.allclose(fit_focal(lens, (480, 832), (1280, 1280)), torch.full((2,), 1.2 * 832).double())
    assert torch.allclose(fit_focal(lens, (480, 832), (480, 832)), torch.tensor([1.2 * 832, 1.2 * 480]).double())
    wide = fit_focal(lens, (480, 832), (480, 1664))  # twice as wide: half of the width is cropped away
    assert torch.allclose(wide, torch.tensor([1.2 * 1664, 1.2 * 480]).double())


def test_frames_are_packed_four_to_a_latent_frame() -> None:
    rays = torch.arange(9.0)[:, None, None, None] + 100 * torch.arange(6.0)[None, :, None, None]
    packed = pack_frames(rays.expand(2, 9, 6, 1, 1))
    assert packed.shape == (2, 24, 3, 1, 1)
    for channel in range(6):
        for sub in range(4):
            values = packed[0, 4 * channel + sub, :, 0, 0] - 100 * channel
            assert values.tolist() == [0, 1 + sub, 5 + sub]
    with pytest.raises(DataError, match="4k \\+ 1"):
        pack_frames(rays[:8])
    assert pack_frames(ray_map(sample(2, 9), (4, 6), reference_size=None)).shape == (2, 24, 3, 4, 6)


def test_camera_vectors() -> None:
    camera = sample(9)
    vector = camera_vectors(camera)[3]
    assert vector[:7].tolist() == [0, 0.9, 1.5, 0.5, 0.5, 0, 0]
    assert torch.equal(vector[7:].view(3, 4), camera.c2w[3, :3])
