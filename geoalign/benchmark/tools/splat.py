"""Points with features seen by a camera, in float64 or float32: discs around pixel centres, blended front to back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.geometry import so3


@dataclass(frozen=True, slots=True)
class Disc:
    """How a point is drawn.

    Attributes:
        radius: of its disc on the screen, whose shorter side is 2 long.
        layers: how many points a pixel blends, the nearest first.
    """

    radius: float = 0.005
    layers: int = 10


def unproject(depth: Tensor, c2w: Tensor, intrinsics: Tensor, *, pixel_centre: float = 0.5) -> Tensor:
    """World points ``[H, W, 3]`` of a depth map.

    Args:
        depth: ``[H, W]`` along the optical axis.
        c2w: ``[4, 4]``.
        intrinsics: ``[4]`` fx, fy, cx, cy as fractions of (W, H, W, H).
        pixel_centre: where in a pixel its ray starts, as a fraction of it from its upper left corner.
    """
    height, width = depth.shape
    x = (torch.arange(width).to(depth) + pixel_centre) / width
    y = (torch.arange(height).to(depth) + pixel_centre) / height
    fx, fy, cx, cy = intrinsics.to(depth)
    rays = torch.stack([*torch.meshgrid((x - cx) / fx, (y - cy) / fy, indexing="xy"), torch.ones_like(depth)], -1)
    return so3.apply(c2w[:3, :3].to(depth), depth[..., None] * rays) + c2w[:3, 3].to(depth)


def splat(
    points: Tensor, features: Tensor, c2w: Tensor, intrinsics: Tensor, size: tuple[int, int], disc: Disc | None = None
) -> tuple[Tensor, Tensor]:
    """What a camera sees of a cloud.

    A point covers the pixels whose centres lie nearer to it on the screen than the radius r, with opacity
    ``1 - d^2 / r^2``. A pixel blends its nearest points, each with what the nearer ones let through.

    Args:
        points: ``[N, 3]`` world, float32 or float64, which is what is computed in.
        features: ``[N, C]`` of any dtype.
        c2w: ``[4, 4]`` of the camera.
        intrinsics: ``[4]`` as fractions.
        size: (H, W).
        disc: how points are drawn.

    Returns:
        ``[H, W, C]`` in the dtype of ``points``, 0 where no point is; and ``[H, W]`` bool, where one is.
    """
    disc = disc or Disc()
    owner, distance, pixel = _hits(points, c2w, intrinsics, size, disc.radius)
    pixels = size[0] * size[1]
    first = torch.bincount(pixel, minlength=pixels).cumsum(0).roll(1)
    first[0] = 0
    layer = torch.arange(len(pixel), device=pixel.device) - first[pixel]
    kept = layer < disc.layers
    owners = torch.zeros(pixels, disc.layers, dtype=torch.long, device=pixel.device)
    opacity = points.new_zeros(pixels, disc.layers)
    owners[pixel[kept], layer[kept]] = owner[kept]
    opacity[pixel[kept], layer[kept]] = 1 - distance[kept] / disc.radius**2
    passed = torch.cat([opacity.new_ones(pixels, 1), (1 - opacity[:, :-1]).cumprod(1)], 1)
    weights = opacity * passed
    seen = points.new_zeros(pixels, features.shape[1])
    for index in range(disc.layers):
        drawn = (weights[:, index] > 0).nonzero()[:, 0]
        seen[drawn] += weights[drawn, index, None] * features[owners[drawn, index]].to(points)
    covered = torch.zeros(pixels, dtype=torch.bool, device=pixel.device)
    covered[pixel] = True
    return seen.unflatten(0, size), covered.unflatten(0, size)


def _hits(
    points: Tensor, c2w: Tensor, intrinsics: Tensor, size: tuple[int, int], radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the point, squared distance and index of the pixel of every covering, by pixel and then by depth."""
    height, width = size
    lens, pose = intrinsics.to(points), c2w.to(points)
    seen = so3.apply(pose[:3, :3].T, points - pose[:3, 3])
    owner = ((seen[:, 2] > 0) & torch.isfinite(seen).all(1)).nonzero()[:, 0]
    flat = seen[owner, :2] / seen[owner, 2:]
    place = (flat * lens[:2] + lens[2:]) * points.new_tensor([width, height])
    unit = min(size) / 2
    reach = int(radius * unit + 0.5)
    owners, distances, pixels = [], [], []
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            column, row = place[:, 0].floor() + right, place[:, 1].floor() + down
            squared = (((column + 0.5 - place[:, 0]) / unit) ** 2) + (((row + 0.5 - place[:, 1]) / unit) ** 2)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            hit = (inside & (squared < radius**2)).nonzero()[:, 0]
            owners.append(owner[hit])
            distances.append(squared[hit])
            pixels.append((row[hit] * width + column[hit]).long())
    owner, squared, pixel = torch.cat(owners), torch.cat(distances), torch.cat(pixels)
    order = seen[owner, 2].argsort(stable=True)
    order = order[pixel[order].argsort(stable=True)]
    return owner[order], squared[order], pixel[order]
