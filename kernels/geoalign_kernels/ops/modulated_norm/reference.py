"""Definition of the modulated LayerNorm in plain torch, any floating dtype; float32 arithmetic, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.rows import modulated, norm_gradient


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, in ``dtype`` or that of x."""
    return modulated(x, scale, shift, eps).to(dtype or x.dtype)


def modulated_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """dx; mean and standard deviation are recomputed."""
    return norm_gradient(grad, x, scale, eps).to(x.dtype)
