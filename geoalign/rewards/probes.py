"""Videos that try to cheat a camera reward; each must score below the honest video by a clear margin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Probe = Callable[[Tensor], Tensor]


def frozen(video: Tensor) -> Tensor:
    """The first frame throughout."""
    return video[:, :1].expand_as(video).contiguous()


def reversed_in_time(video: Tensor) -> Tensor:
    """Played backwards."""
    return video.flip(1)


def black(video: Tensor) -> Tensor:
    """Black frames."""
    return torch.full_like(video, -1.0)


def repeated(video: Tensor) -> Tensor:
    """Every second frame repeats the one before it."""
    index = torch.arange(video.shape[1]) // 2 * 2
    return video[:, index]


def noise(video: Tensor) -> Tensor:
    """White noise with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(video.shape, generator=generator).clamp(-1, 1).to(video)


def vanishing(video: Tensor) -> Tensor:
    """The picture fades to flat grey: all content is gone in the second half."""
    keep = (1 - torch.arange(video.shape[1]) / (video.shape[1] / 2)).clamp_min(0)
    return video * keep.to(video)[None, :, None, None, None]


PROBES: dict[str, Probe] = {
    "frozen": frozen,
    "reversed": reversed_in_time,
    "black": black,
    "repeated": repeated,
    "noise": noise,
    "vanishing": vanishing,
}
"""Probes that need nothing but the honest video; "wrong_scale" needs a renderer and is made where there is one."""
