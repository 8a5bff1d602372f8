"""Definition of the modulated LayerNorm in plain torch, any floating dtype; float32 arithmetic, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, D] or [D] as [B or 1, 1, D]."""
    return vector.to(dtype).reshape(-1, 1, vector.shape[-1])


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std of the rows and 1 / std, both in the working dtype."""
    value = x.to(working_dtype(x))
    centred = value - value.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def norm_gradient(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient to x of unit = LayerNorm(x), from the gradient to `unit`."""
    return inverse * (grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True))


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, in `dtype` or that of x."""
    unit, _ = normalised(x, eps)
    return (unit * (1.0 + per_sample(scale, unit.dtype)) + per_sample(shift, unit.dtype)).to(dtype or x.dtype)


def modulated_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """dx; mean and standard deviation are recomputed."""
    unit, inverse = normalised(x, eps)
    return norm_gradient(grad.to(unit) * (1.0 + per_sample(scale, unit.dtype)), unit, inverse).to(x.dtype)
