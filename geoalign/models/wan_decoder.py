"""The Wan decoder with less memory traffic: the same convolutions, with norms, activations and padding in fewer passes.

Of what diffusers' decoder moves through memory in bfloat16, its convolutions move a tenth (docs/engine.md). The norms,
which go to float32 and back in nine passes, move more than half, and zeros are added by copies of the whole video. Here
a norm takes three passes and rounds twice instead of four times, an activation overwrites its input, and a convolution
pads itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_EPS = 1e-12
"""Of ``torch.nn.functional.normalize``."""


def make_lean(vae: AutoencoderKLWan) -> None:
    """Give the decoder of ``vae`` these passes, in place; names and values of its parameters stay.

    Forwards with gradients run the norms as they were.
    """
    leaner = _leaner()
    for module in vae.decoder.modules():
        module.__class__ = leaner.get(type(module), type(module))


@cache
def _leaner() -> dict[type[nn.Module], type[nn.Module]]:
    """Class: the one that takes its place. In the decoder an activation is the only reader of a norm."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    class Norm(wan.WanRMS_norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.is_grad_enabled() or not self.channel_first else _norm(self, x)

    class Convolution(wan.WanCausalConv3d):
        def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            return _convolution(self, x, cache_x)

    return {wan.WanRMS_norm: Norm, wan.WanCausalConv3d: Convolution, nn.SiLU: _InPlace}


class _InPlace(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, inplace=not torch.is_grad_enabled())


def _norm(norm: Any, x: Tensor) -> Tensor:
    """``x / |x| * sqrt(C) * gamma`` over the channels of ``x`` [B, C, ...], in float32 at least, in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min_(_EPS)
    out = torch.div(x, length, out=torch.empty_like(x))
    out.mul_(norm.gamma.to(wide) * norm.scale)
    return out if isinstance(norm.bias, float) else out.add_(norm.bias)


def _convolution(convolution: Any, x: Tensor, kept: Tensor | None) -> Tensor:
    """The convolution of ``x`` [B, C, T, H, W] after the frames kept of the chunk before it, or after zeros."""
    columns, _, rows, _, earlier, _ = convolution._padding
    if kept is not None and earlier > 0:
        x = torch.cat([kept.to(x.device), x], 2)
        earlier -= kept.shape[2]
    if earlier > 0:
        x = F.pad(x, (0, 0, 0, 0, earlier, 0))
    padding = (0, rows, columns)
    return F.conv3d(
        x, convolution.weight, convolution.bias, convolution.stride, padding, convolution.dilation, convolution.groups
    )
