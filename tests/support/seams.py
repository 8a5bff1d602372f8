"""How visible the borders of patches are."""

from __future__ import annotations

import torch
from torch import Tensor


def seam_ratio(video: Tensor, patch: int) -> float:
    """Mean squared gradient across patch borders over that inside patches (1 = no seams), ``[B, F, 3, H, W]`` in."""
    down, right = video.diff(dim=-2).square(), video.diff(dim=-1).square()
    rows = torch.arange(1, video.shape[-2]) % patch == 0
    columns = torch.arange(1, video.shape[-1]) % patch == 0
    seams = torch.cat([down[..., rows, :].flatten(), right[..., columns].flatten()]).mean()
    inside = torch.cat([down[..., ~rows, :].flatten(), right[..., ~columns].flatten()]).mean()
    return float(seams / inside)
