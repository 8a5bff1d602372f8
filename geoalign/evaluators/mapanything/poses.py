"""Pose maths of the reward path: float32 without TF32 (no matrix units), no host reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]``, x y z w, of any length but zero."""
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def small_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for 3 x 3 and 3 x n matrices as a plain sum, which no TF32 setting can round."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(dim=-2)


def relative_to_first(quaternion: Tensor, translation: Tensor) -> Tensor:
    """Camera-to-world ``[..., V, 4, 4]`` in the axes of view 0, whose own pose becomes the exact identity.

    Args:
        quaternion: ``[..., V, 4]`` x y z w, camera-to-world.
        translation: ``[..., V, 3]`` camera centres.
    """
    rotation = quaternion_to_rotation(quaternion)
    first = rotation[..., :1, :, :].transpose(-1, -2)
    turned = small_matmul(first, rotation)
    moved = small_matmul(first, (translation - translation[..., :1, :]).unsqueeze(-1))
    bottom = F.pad(torch.ones_like(moved[..., :1, :]), (3, 0))
    c2w = torch.cat([torch.cat([turned, moved], dim=-1), bottom], dim=-2)
    # R0^T R0 is the identity up to rounding only; a target's frame 0 is the identity exactly.
    identity = torch.eye(4, device=c2w.device, dtype=c2w.dtype).expand_as(c2w[..., :1, :, :])
    return torch.cat([identity, c2w[..., 1:, :, :]], dim=-3)
