"""Plain torch that several ops share: rotation of adjacent pairs by positions and camera phases.

Phases are [B or 1, S, H or 1, P] and act on the last P pairs of every head. Triton counterpart: ``triton_angles``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels.rows import working_dtype


def check_phase(name: str, phase: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError unless ``phase`` is None or [B or 1, S, H or 1, P <= hd/2] for ``shape`` = (B, S, H, hd)."""
    if phase is None:
        return
    batch, tokens, heads, head = shape
    fits = phase.dim() == 4 and phase.shape[0] in (1, batch) and phase.shape[1] == tokens
    if not (fits and phase.shape[2] in (1, heads) and 0 < phase.shape[3] <= head // 2):
        raise ValueError(
            f"{name} must be [{batch} or 1, {tokens}, {heads} or 1, P <= {head // 2}], got {list(phase.shape)}"
        )


def rotation(position: Tensor | None, phase: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of position + phase, broadcastable to [B, S, H, hd/2]; None if there is nothing to rotate by."""
    if position is None and phase is None:
        return None
    dtype = working_dtype(like)
    tokens, pairs = like.shape[1], like.shape[-1] // 2
    angle = torch.zeros(1, tokens, 1, pairs, dtype=dtype, device=like.device)
    if position is not None:
        angle = angle + position[:tokens, None].to(dtype)
    if phase is not None:
        phase = phase[:, :tokens].to(dtype)
        angle = angle + torch.nn.functional.pad(phase, (pairs - phase.shape[-1], 0))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor] | None, *, inverse: bool = False) -> Tensor:
    """Multiplies the adjacent pairs of x [B, S, H, hd] by exp(i angle), or by its inverse."""
    if turn is None:
        return x
    cosine, sine = turn
    if inverse:
        sine = -sine
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1).flatten(-2)


def phase_gradient(x: Tensor, grad: Tensor, pairs: int) -> Tensor:
    """d loss / d angle = Im(conj(x) grad) of the last ``pairs`` pairs; the same before and after a common rotation."""
    x_real, x_imaginary = x.unflatten(-1, (-1, 2))[..., -pairs:, :].unbind(-1)
    g_real, g_imaginary = grad.unflatten(-1, (-1, 2))[..., -pairs:, :].unbind(-1)
    return x_real * g_imaginary - x_imaginary * g_real
