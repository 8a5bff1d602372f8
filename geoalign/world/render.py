"""Exact pinhole renders of the embedded world."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.config.world import WorldConfig
from geoalign.geometry.plane import ground_axes, intersect_plane, pixel_grid, pixel_rays
from geoalign.world.scene import Scene, colour


def intrinsics(world: WorldConfig) -> Tensor:
    """``[4]`` fx, fy, cx, cy as fractions of (W, H, W, H); the principal point is the image centre."""
    return torch.tensor([world.focal_px / world.width, world.focal_px / world.height, 0.5, 0.5])


@torch.no_grad()
def render(scene: Scene, c2w: Tensor, plane: Tensor, world: WorldConfig) -> Tensor:
    """Render B videos.

    Args:
        scene: B scenes.
        c2w: ``[B, F, 4, 4]`` camera-to-world relative to the first source frame, metres.
        plane: ``[B, 4]`` ground plane in the same frame.
        world: frame size and focal length.

    Returns:
        ``[B, F, 3, H, W]`` float32 in [-1, 1].
    """
    batch, frames = c2w.shape[:2]
    rays = pixel_rays(intrinsics(world), pixel_grid(world.height, world.width))
    points = intersect_plane(c2w, rays.expand(batch, frames, -1, -1), plane[:, None])
    ground = points @ ground_axes(plane)[:, None, :2].transpose(-1, -2)
    video = colour(scene, ground.flatten(1, 2)).reshape(batch, frames, world.height, world.width, 3)
    return video.permute(0, 1, 4, 2, 3).contiguous()
