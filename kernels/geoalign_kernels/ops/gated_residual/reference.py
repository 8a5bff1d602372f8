"""Definition of the gated residual in plain torch, any floating dtype; float32 arithmetic, one rounding."""

from __future__ import annotations

from torch import Tensor

from geoalign_kernels.rows import per_sample, working_dtype


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, in the dtype of x."""
    dtype = working_dtype(x)
    return (x.to(dtype) + per_sample(gate, dtype) * y.to(dtype)).to(x.dtype)


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """dy = gate * grad, in the dtype of y, which may be empty; dx is grad itself."""
    dtype = working_dtype(grad)
    return (per_sample(gate, dtype) * grad.to(dtype)).to(y.dtype)
