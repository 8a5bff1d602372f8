"""Where cameras enter the transformer: ray maps, the Pluecker adapter, and the two providers of camera phases.

Learned phases (ReDirector): the adapter's output A is added to the patch embedding, and every self-attention layer maps
it to phases ``W SiLU(A)`` of its last (row, column) pairs. Geometric phases (embedded default): the ray of every patch
is intersected with the scene's known ground plane, and the phase moves the patch to the place where its ground point
would appear on a map, so that attention compares ground points instead of grid positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.config.model import ModelConfig
from geoalign.errors import UsageError
from geoalign.geometry.plane import ground_axes, intersect_plane, pixel_grid, pixel_rays, scaled_motion
from geoalign.geometry.pluecker import pack_frames, ray_map
from geoalign.models.conditioning import Conditioning, Phases
from geoalign.models.rope import axis_frequencies, axis_pairs, frame_indices, grid_angles

if TYPE_CHECKING:
    from geoalign.geometry.trajectory import CameraTrajectory

# Height that the token embedding calls "zero", and the scale of its logarithm (10 % of height = 0.4).
_REFERENCE_HEIGHT_M, _LOG_HEIGHT_SCALE = 10.0, 4.0


class PlueckerAdapter(nn.Module):
    """Ray maps to one camera token per patch (Wan-Fun-Control-Camera's control adapter, one residual block)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.unshuffle = config.space_stride
        kernel = config.patch[1:]
        channels = 6 * config.time_stride * config.space_stride**2
        self.conv = nn.Conv2d(channels, config.dim, kernel, stride=kernel)
        self.residual_blocks = nn.ModuleList([_ResidualBlock(config.dim)])

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``[B, 6 * time_stride, T, H, W]`` ray maps to ``[B, T * rows * columns, dim]`` tokens."""
        batch, _, frames = maps.shape[:3]
        x = F.pixel_unshuffle(maps.transpose(1, 2).flatten(0, 1).to(self.conv.weight.dtype), self.unshuffle)
        x = self.conv(x)
        for block in self.residual_blocks:
            x = block(x)
        return x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames)).flatten(1, 2)


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


def adapter_input(camera: CameraTrajectory, height: int, width: int, stride: int) -> Tensor:
    """Ray maps of B trajectories, ``[B, 6 * stride, T, height, width]``; ``stride`` video frames per latent frame."""
    rays = ray_map(camera, (height, width), reference_size=None)
    return pack_frames(rays) if stride == 4 else rays.transpose(1, 2)


def latent_frame_poses(camera: CameraTrajectory, stride: int) -> Tensor:
    """Poses ``[B, T, 4, 4]`` of the video frames 0, stride, 2 stride, .. that latent frames begin with."""
    return camera.c2w[:, ::stride]


class GeometricEmbedding(nn.Module):
    """Token embedding of a patch's place in the picture and its stream; it does not know how the target moves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position = nn.Linear(3, config.dim)
        self.stream = nn.Parameter(torch.zeros(2, config.dim))
        """Row 0: target, row 1: source."""

    def forward(self, pixels: Tensor, plane_distance: Tensor, target_frames: int, source_frames: int) -> Tensor:
        """Embed patch centres ``[n, 2]`` (fractions of the frame) at heights ``[B]``: ``[B, N, dim]``, target first."""
        log_height = (plane_distance / _REFERENCE_HEIGHT_M).log() * _LOG_HEIGHT_SCALE
        batch, count = len(log_height), len(pixels)
        features = torch.cat(
            [(4 * pixels - 2).expand(batch, count, 2), log_height[:, None, None].expand(batch, count, 1)], -1
        )
        place = self.position(features.to(self.position.weight))
        target = (place + self.stream[0]).repeat(1, target_frames, 1)
        return torch.cat([target, (place + self.stream[1]).repeat(1, source_frames, 1)], 1)


def geometric_phases(
    config: ModelConfig, gains: Tensor, cond: Conditioning, target_frames: int, grid: tuple[int, int, int]
) -> tuple[Phases, ...]:
    """Phases of all layers from ray-ground intersections; those of q and k hold the positions too.

    Args:
        config: model settings.
        gains: ``[layers, heads, 4]`` log-gains of the target's translation (three ground-aligned axes) and rotation.
        cond: needs both cameras and the ground plane.
        target_frames: latent frames of the noisy target.
        grid: latent frames of the source, token rows and columns.

    Returns:
        One :class:`Phases` per layer, differentiable with respect to ``gains``. The angle of q and k is
        ``theta * (time, map row, map column)``; the camera part ``theta * (map - grid)`` is what it adds to plain RoPE.
    """
    source_camera, target_camera, plane = _geometry(cond)
    source_frames, rows, columns = grid
    layers, heads = gains.shape[:2]
    pixels = pixel_grid(rows, columns).to(plane)
    rays = pixel_rays(source_camera.intrinsics[:, :: config.time_stride], pixels)
    focal = source_camera.intrinsics[:, 0, :2] * rays.new_tensor([columns, rows])
    source = _map_position(latent_frame_poses(source_camera, config.time_stride), rays, plane, focal)
    poses = latent_frame_poses(target_camera, config.time_stride)[:, -target_frames:]
    moved = scaled_poses(poses, plane, gains.flatten(0, 1))
    rays = pixel_rays(target_camera.intrinsics[:, :: config.time_stride][:, -target_frames:], pixels)
    target = _map_position(moved, rays[:, None], plane[:, None], focal[:, None])
    position = torch.cat([target.flatten(2, 3), source.flatten(1, 2)[:, None].expand(-1, layers * heads, -1, -1)], 2)
    frequency = [axis_frequencies(config, axis, plane.device) for axis in (1, 2)]
    spatial = torch.cat([position[..., 1:] * frequency[0], position[..., :1] * frequency[1]], -1)  # [B, LH, N, pairs]
    spatial = spatial.unflatten(1, (layers, heads)).transpose(2, 3)  # [B, layers, N, heads, spatial pairs]
    index = frame_indices(config, target_frames, source_frames)
    pairs = axis_pairs(config.head_dim)[0]
    time = grid_angles(config, index, rows, columns, plane.device)[:, None, :pairs]
    angle = torch.cat([time.expand(*spatial.shape[:-1], pairs).to(spatial), spatial], -1)
    return tuple(Phases(qk, vo) for qk, vo in zip(angle.unbind(1), spatial.unbind(1), strict=True))


def scaled_poses(c2w: Tensor, plane: Tensor, gains: Tensor) -> Tensor:
    """Multiply motions by ``exp(gains)``.

    Args:
        c2w: ``[B, T, 4, 4]`` poses relative to the plane's reference frame, rotations below 180 degrees.
        plane: ``[B, 4]``.
        gains: ``[K, 4]`` log-gains: translation along e1, e2 (on the plane) and the normal; rotation vector.

    Returns:
        ``[B, K, T, 4, 4]``; equal to ``c2w`` for zero gains up to rounding.
    """
    return scaled_motion(c2w[:, None], plane[:, None], gains.exp()[:, None])


def _map_position(c2w: Tensor, rays: Tensor, plane: Tensor, focal: Tensor) -> Tensor:
    """Where rays meet the ground, in patches of a map seen from straight above the reference camera.

    ``c2w`` ``[..., T, 4, 4]``, ``rays`` ``[..., T, n, 3]``, ``plane`` ``[..., 4]``, ``focal`` ``[..., 2]`` in patches;
    returns ``[..., T, n, 2]`` (column, row).
    """
    points = intersect_plane(c2w, rays, plane[..., None, :])
    along = points @ ground_axes(plane)[..., None, :2, :].transpose(-1, -2)
    return along / plane[..., None, None, 3:] * focal[..., None, None, :]


def _geometry(cond: Conditioning) -> tuple[CameraTrajectory, CameraTrajectory, Tensor]:
    if cond.source_camera is None or cond.target_camera is None or cond.ground_plane is None:
        raise UsageError("geometric camera phases need the source camera, the target camera and the ground plane")
    return cond.source_camera, cond.target_camera, cond.ground_plane
