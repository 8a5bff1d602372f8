"""Plain torch that several ops share: the working dtype, vectors per sample, and LayerNorm of the rows of [B, S, D].

The definitions (``ops/*/reference.py``) and public functions import it; its Triton counterpart is ``triton_rows``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs (gradient checks)."""
    return torch.promote_types(x.dtype, torch.float32)


def check_vectors(x: Tensor, **vectors: Tensor) -> None:
    """Raises ValueError unless x is [B, S, D] and every vector [B or 1, D] or [D]."""
    if x.dim() != 3:
        raise ValueError(f"x must be [B, S, D], got {list(x.shape)}")
    for name, vector in vectors.items():
        if tuple(vector.shape) not in ((x.shape[2],), (1, x.shape[2]), (x.shape[0], x.shape[2])):
            raise ValueError(f"{name} must be [{x.shape[0]} or 1, {x.shape[2]}], got {list(vector.shape)}")


def per_sample(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, D] or [D] as [B or 1, 1, D]."""
    return vector.to(dtype).reshape(-1, 1, vector.shape[-1])


def vector_gradient(grad: Tensor, vector: Tensor) -> Tensor:
    """Sums a gradient [B, S, D] over tokens (and samples) to the shape and dtype of ``vector``."""
    summed = grad.sum(1)
    return summed.sum_to_size(vector.shape if vector.dim() == 2 else (1, *vector.shape)).view_as(vector).to(vector)


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std of the rows [B, S, D] and 1 / std [B, S, 1], both in the working dtype."""
    value = x.to(working_dtype(x))
    centred = value - value.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, in the working dtype."""
    unit, _ = normalised(x, eps)
    return unit * (1.0 + per_sample(scale, unit.dtype)) + per_sample(shift, unit.dtype)


def norm_gradient(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Gradient to x of ``modulated``, in the working dtype; mean and standard deviation are recomputed."""
    unit, inverse = normalised(x, eps)
    dunit = grad.to(unit) * (1.0 + per_sample(scale, unit.dtype))
    return inverse * (dunit - dunit.mean(-1, keepdim=True) - unit * (dunit * unit).mean(-1, keepdim=True))
