"""Definition of RMSNorm in plain torch, any floating dtype; float32 arithmetic, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.rows import working_dtype


def gradient_buffers(grad: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Room for (dx, dweight in the working dtype); what is not needed is empty."""
    dtype = working_dtype(grad)
    return grad.new_empty(grad.shape if needs[0] else 0), weight.new_zeros(weight.shape if needs[1] else 0, dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x."""
    value = x.to(working_dtype(x))
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * inverse * weight.to(value)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx, dweight) as far as ``needs`` asks for each."""
    dx, dweight = gradient_buffers(grad, weight, needs)
    value = x.to(working_dtype(x))
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    unit, dy = value * inverse, grad.to(value)
    if needs[0]:
        dunit = dy * weight.to(value)
        dx.copy_(inverse * (dunit - unit * (dunit * unit).mean(-1, keepdim=True)))
    if needs[1]:
        dweight.copy_((dy * unit).sum((0, 1)))
    return dx, dweight
