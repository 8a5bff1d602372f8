"""Motions along the axes of the ground: read from poses, scaled axis by axis, compared."""

from __future__ import annotations

import math

import torch

from geoalign.config.world import WorldConfig
from geoalign.geometry.metrics import axis_gains
from geoalign.geometry.plane import ground_motion, scaled_motion
from geoalign.world.motion import ground_plane, random_curves, to_c2w

WORLD = WorldConfig(frames=6)
MOTION = random_curves(8, WORLD.frames, torch.Generator().manual_seed(3)).double()
PLANE = ground_plane(WORLD, torch.full((8,), 10.0)).double()
FACTOR = torch.tensor([0.7, 1.6, 0.5, 1.2], dtype=torch.float64)


def test_a_motion_is_read_back_from_its_poses() -> None:
    """The poses come from the world's own closed form, which shares no code with the reading."""
    found = ground_motion(to_c2w(MOTION, WORLD), PLANE)
    assert torch.allclose(found, MOTION, atol=1e-6)  # the world's normal is a float32 one


def test_scaling_poses_scales_the_motion() -> None:
    wanted = to_c2w(MOTION * FACTOR, WORLD)
    assert torch.allclose(scaled_motion(to_c2w(MOTION, WORLD), PLANE, FACTOR[None]), wanted, atol=1e-6)
    growing = FACTOR ** torch.linspace(0, 1, WORLD.frames, dtype=torch.float64)[:, None]
    wanted = to_c2w(MOTION * growing, WORLD)
    assert torch.allclose(scaled_motion(to_c2w(MOTION, WORLD), PLANE, growing), wanted, atol=1e-6)


def test_gains_along_axes_are_the_planted_ones() -> None:
    """Also with trembling that is as often with the motion as against it, without a video that cannot be read."""
    target = to_c2w(MOTION, WORLD)
    estimate = to_c2w(MOTION * FACTOR, WORLD)
    assert torch.allclose(axis_gains(estimate, target, PLANE), FACTOR, atol=1e-6)
    estimate[3] = math.nan
    assert torch.allclose(axis_gains(estimate, target, PLANE), FACTOR, atol=1e-6)
    both = torch.cat([MOTION * FACTOR + 0.3, MOTION * FACTOR - 0.3])
    pooled = axis_gains(to_c2w(both, WORLD), target.repeat(2, 1, 1, 1), PLANE.repeat(2, 1))
    assert torch.allclose(pooled, FACTOR, atol=1e-6)


def test_an_axis_on_which_nothing_was_asked_has_no_gain() -> None:
    still = MOTION.clone()
    still[..., 2] = 0
    gains = axis_gains(to_c2w(MOTION, WORLD), to_c2w(still, WORLD), PLANE)
    assert gains.isnan().tolist() == [False, False, True, False]
