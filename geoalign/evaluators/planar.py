"""Weight-free metric pose evaluator for cameras above known ground: dense alignment to the source frames.

Every evaluated frame is aligned to one source frame by Gauss-Newton over four degrees of freedom (translation in metres
and yaw about the plane normal), coarse to fine, with a robust (Tukey) weight whose scale is the median residual. Metric
scale comes from the known height of the source's first camera; the target trajectory is never seen. Tracking starts at
the source's first pose and continues at constant velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.base import NO_PLANE, PoseEstimate
from geoalign.geometry.plane import ground_axes, pixel_grid, pixel_rays
from geoalign.types import SourceClip

_LUMA = (0.299, 0.587, 0.114)
_MAX_STEP = 0.35  # of (translation / height, radians): keeps the first steps inside the basin of the blurred level
_BOUND = (8.0, 8.0, 4.5, 1.2)  # metres along e1, e2, down, and radians: the search ends here (docs/evaluators.md)


@dataclass(frozen=True, slots=True)
class _Reference:
    """One source frame prepared for alignment: luma and its pixel gradients, camera, plane axes."""

    image: Tensor  # [B, 3, H, W]: value, d/dx, d/dy
    c2w: Tensor  # [B, 4, 4]
    intrinsics: Tensor  # [B, 4]


class PlanarAligner:
    """PoseEvaluator by direct alignment above a plane.

    Args:
        levels: (blur sigma in pixels, Gauss-Newton iterations), coarse to fine.
        step, offset: every ``step``-th pixel from ``offset`` on is used, so two aligners can use disjoint pixels.
        reference: which source frame a generated frame is aligned to, "same" index or the "first".

    Raises UsageError for values that leave nothing to align.
    """

    name = "planar"

    def __init__(
        self,
        levels: tuple[tuple[float, int], ...] = ((4.0, 4), (1.0, 3)),
        step: int = 4,
        offset: int = 2,
        reference: Literal["same", "first"] = "same",
    ) -> None:
        if not levels or any(not 0 <= sigma < math.inf or iterations < 1 for sigma, iterations in levels):
            raise UsageError(f"levels are pairs of a blur >= 0 and at least 1 iteration, got {levels}")
        if step < 1 or offset < 0:
            raise UsageError(f"need step >= 1 and offset >= 0, got {step} and {offset}")
        self.levels, self.step, self.offset, self.reference = levels, step, offset, reference

    @torch.no_grad()
    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Read the camera of ``video`` ``[B, F, 3, H, W]``; frame 0 is given and returned as the identity."""
        device, video, source = video.device, video.cpu(), source.to("cpu")  # small matrices: no work for a GPU
        plane = source.ground_plane
        if plane is None:
            raise UsageError(NO_PLANE.format("planar"))
        batch, frames, _, height, width = video.shape
        axes = ground_axes(plane)
        rays = pixel_rays(source.camera.intrinsics[:, 0], pixel_grid(height, width, step=self.step, offset=self.offset))
        local = rays @ axes.transpose(-1, -2)
        slope = local[..., :2] / local[..., 2:].clamp_min(0.05)  # where a ray meets the ground, per metre of height
        generated = [
            _luma_levels(video, sigma)[:, :, self.offset :: self.step, self.offset :: self.step]
            for sigma, _ in self.levels
        ]
        references = [_with_gradients(_luma_levels(source.video, sigma)) for sigma, _ in self.levels]
        motion = torch.zeros(batch, frames, 4)
        residual, tracked = torch.zeros(batch, frames), torch.ones(batch, frames)
        for i in range(1, frames):
            pose = motion[:, i - 1] + (motion[:, i - 1] - motion[:, max(i - 2, 0)])
            j = i if self.reference == "same" else 0
            for level, (_, iterations) in enumerate(self.levels):
                camera = source.camera
                reference = _Reference(references[level][:, j], camera.c2w[:, j], camera.intrinsics[:, j])
                values = generated[level][:, i].flatten(1)
                for _ in range(iterations):
                    pose, residual[:, i], tracked[:, i] = _gauss_newton(
                        pose, values, slope, reference, plane[:, 3], axes
                    )
            motion[:, i] = pose
        return PoseEstimate(
            c2w=_motion_to_c2w(motion, axes).to(device),
            frame_indices=torch.arange(frames, device=device),
            tracked=tracked[:, 1:].mean(1).to(device),
            residual=residual[:, 1:].mean(1).to(device),
        )


def _gauss_newton(
    pose: Tensor, values: Tensor, slope: Tensor, reference: _Reference, height: Tensor, axes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One damped step: the new pose ``[B, 4]``, mean robust residual ``[B]`` and explained share ``[B]``."""
    cos, sin = pose[:, 3:].cos(), pose[:, 3:].sin()
    turned_x, turned_y = cos * slope[..., 0] - sin * slope[..., 1], sin * slope[..., 0] + cos * slope[..., 1]
    above = (height - pose[:, 2])[:, None]
    ground = torch.stack([pose[:, :1] + above * turned_x, pose[:, 1:2] + above * turned_y], -1)  # [B, N, 2]
    points = ground @ axes[:, :2] + height[:, None, None] * axes[:, None, 2]
    rotation = reference.c2w[:, :3, :3]
    seen = (points - reference.c2w[:, None, :3, 3]) @ rotation
    depth = seen[..., 2].clamp_min(1e-3)
    uv = seen[..., :2] / depth[..., None] * reference.intrinsics[:, None, :2] + reference.intrinsics[:, None, 2:]
    sampled = F.grid_sample(reference.image, (uv * 2 - 1)[:, None], align_corners=False, padding_mode="border")[:, :, 0]
    inside = ((uv > 0) & (uv < 1)).all(-1).float()
    error = sampled[:, 0] - values
    scale = (
        1.4826 * torch.where(inside > 0, error.abs(), torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(1.0)
        + 0.01
    )
    weight = inside * (1 - (error / (4 * scale)).square()).clamp_min(0).square()
    # Chain rule: value -> pixel -> ground point -> pose.
    size = torch.tensor([reference.image.shape[-1], reference.image.shape[-2]], dtype=uv.dtype)
    moved = axes[:, :2] @ rotation  # rows: camera-frame direction of a ground step along e1, e2
    shift = (moved[:, None, :, :2] - (seen[..., None, :2] / depth[..., None, None]) * moved[:, None, :, 2:]) / depth[
        ..., None, None
    ]
    slope_ground = (
        shift * (reference.intrinsics[:, None, None, :2] * size) * sampled[:, None, 1:].permute(0, 3, 1, 2)
    ).sum(-1)
    gx, gy = slope_ground[..., 0], slope_ground[..., 1]
    jacobian = torch.stack([gx, gy, -(gx * turned_x + gy * turned_y), above * (gy * turned_x - gx * turned_y)], -1)
    unit = torch.cat([height[:, None].expand(-1, 3), torch.ones_like(height)[:, None]], 1)  # metres per unit of height
    jacobian = jacobian * unit[:, None]
    normal = torch.einsum("bn,bni,bnj->bij", weight, jacobian, jacobian)
    damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-4
    step = -torch.linalg.solve(
        normal + damping[:, None, None] * torch.eye(4), torch.einsum("bn,bni,bn->bi", weight, jacobian, error)
    )
    step = step * (_MAX_STEP / step.norm(dim=1, keepdim=True).clamp_min(_MAX_STEP))
    bound = torch.tensor(_BOUND)
    pose = torch.minimum(torch.maximum(pose + step * unit, -bound), bound)
    fitted = (weight > 0).float().sum(1) / inside.sum(1).clamp_min(1)
    residual = (weight * error.abs()).sum(1) / (weight.sum(1) + 1e-3) + (1 - fitted)
    return pose, residual, inside.mean(1) * _explained(sampled[:, 0], values, inside)


def _explained(reference: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """Share ``[B]`` of the variance of ``values`` ``[B, N]`` that the aligned reference explains (squared correlation).

    Near 1 for a true retake, near 0 for noise, black frames or other content, whatever pose the alignment ended in.
    """
    count = inside.sum(1, keepdim=True).clamp_min(1)
    x = (reference - (reference * inside).sum(1, keepdim=True) / count) * inside
    y = (values - (values * inside).sum(1, keepdim=True) / count) * inside
    correlation = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).clamp_min(1e-8).sqrt()
    return correlation.clamp_min(0).square()


def _motion_to_c2w(motion: Tensor, axes: Tensor) -> Tensor:
    """Camera-to-world ``[B, F, 4, 4]`` of motions ``[B, F, 4]`` along axes ``[B, 3, 3]``."""
    turn = torch.zeros(*motion.shape[:2], 3, 3)
    cos, sin = motion[..., 3].cos(), motion[..., 3].sin()
    turn[..., 0, 0], turn[..., 0, 1], turn[..., 1, 0], turn[..., 1, 1], turn[..., 2, 2] = cos, -sin, sin, cos, 1
    c2w = torch.zeros(*motion.shape[:2], 4, 4)
    c2w[..., :3, :3] = axes[:, None].transpose(-1, -2) @ turn @ axes[:, None]
    c2w[..., :3, 3] = motion[..., :3] @ axes
    c2w[..., 3, 3] = 1
    return c2w


def _luma_levels(video: Tensor, sigma: float) -> Tensor:
    """Luma ``[B, F, H, W]``, blurred by a Gaussian of ``sigma`` pixels (0: not at all)."""
    luma = torch.einsum("bfchw,c->bfhw", video, video.new_tensor(_LUMA))
    if sigma <= 0:
        return luma
    radius = int(2.5 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).to(luma) / sigma).square())
    kernel = kernel / kernel.sum()
    flat = luma.flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    return flat[:, 0].unflatten(0, luma.shape[:2])


def _with_gradients(luma: Tensor) -> Tensor:
    """``[B, F, 3, H, W]``: value and central differences along x and y, per pixel."""
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.stack([luma, dx, dy], dim=2)
