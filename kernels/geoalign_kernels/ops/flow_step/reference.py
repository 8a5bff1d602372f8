"""Definition of the sampler step and of its log-density in plain torch, any floating dtype.

Coefficients (a, b, c, d) are float64 host numbers [4] or [B, 4]; they are rounded to the working dtype before use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoalign_kernels.philox import NoiseKey, philox_normal
from geoalign_kernels.rows import working_dtype


def columns(coefficients: Tensor, x: Tensor) -> list[Tensor]:
    """The coefficients as four tensors [B or 1, 1, ...] that broadcast against ``x``."""
    table = coefficients.reshape(-1, 4).to(device=x.device, dtype=working_dtype(x))
    return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in table.unbind(1)]


def guided(velocity: Tensor, velocity_uncond: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance u + g (v - u), or v alone."""
    v = velocity.to(dtype)
    if velocity_uncond is None:
        return v
    u = velocity_uncond.to(dtype)
    return u + guidance * (v - u)


def flow_step(
    x: Tensor,
    velocity: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    key: list[int],
    group: Tensor | None,
    sample: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance: float,
    m_prev: Tensor | None,
) -> Tensor:
    """x' = a x + b v + d m_prev + c eps; eps is ``noise``, or the Philox normals of (key, group, sample)."""
    a, b, c, d = columns(coefficients, x)
    dtype = working_dtype(x)
    x_next = a * x.to(dtype) + b * guided(velocity, velocity_uncond, guidance, dtype)
    if m_prev is not None:
        x_next = x_next + d * m_prev.to(dtype)
    if key and group is not None and sample is not None:
        noise = philox_normal(x.shape[1:], NoiseKey(key[0], key[1], group, sample, key[2], key[3]), device=x.device)
    if noise is not None:
        x_next = x_next + c * noise.to(dtype)
    return x_next


def residual(
    x: Tensor, velocity: Tensor, x_next: Tensor, coefficients: Tensor, velocity_uncond: Tensor | None, guidance: float
) -> Tensor:
    """x' - (a x + b v), the noise part of a stored step."""
    a, b, _, _ = columns(coefficients, x)
    dtype = working_dtype(x)
    return x_next.to(dtype) - (a * x.to(dtype) + b * guided(velocity, velocity_uncond, guidance, dtype))


def flow_log_prob(
    x: Tensor, velocity: Tensor, x_next: Tensor, coefficients: Tensor, velocity_uncond: Tensor | None, guidance: float
) -> Tensor:
    """[B]: mean over elements of ln N(x'; a x + b v, c^2)."""
    mean_square = residual(x, velocity, x_next, coefficients, velocity_uncond, guidance).square().flatten(1).mean(1)
    c = coefficients.reshape(-1, 4)[:, 2]
    constant = c.log() + 0.5 * math.log(2.0 * math.pi)
    precision = (0.5 / c.square()).to(mean_square)
    return -precision * mean_square - constant.to(mean_square)


def gradient_buffers(velocity: Tensor, velocity_uncond: Tensor | None, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Room for the gradients of the two velocities in their dtypes; what is not needed is empty."""
    uncond = velocity if velocity_uncond is None else velocity_uncond
    return (
        torch.empty_like(velocity, memory_format=torch.contiguous_format) if needs[0] else velocity.new_empty(0),
        torch.empty_like(uncond, memory_format=torch.contiguous_format) if needs[1] else uncond.new_empty(0),
    )


def flow_log_prob_backward(
    grad: Tensor,
    x: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    coefficients: Tensor,
    velocity_uncond: Tensor | None,
    guidance: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients to (velocity, velocity_uncond) as far as ``needs`` asks for each.

    That of the guided velocity is grad[B] * b (x' - mean) / (c^2 n); the two share it as guidance and 1 - guidance.
    """
    buffers = gradient_buffers(velocity, velocity_uncond, needs)
    r = residual(x, velocity, x_next, coefficients, velocity_uncond, guidance)
    table = coefficients.reshape(-1, 4)
    weight = (table[:, 1] / (table[:, 2].square() * r.flatten(1).shape[1])).to(r)
    guided = (grad.to(r) * weight).reshape(-1, *[1] * (r.dim() - 1)) * r
    share = 1.0 if velocity_uncond is None else guidance
    for buffer, need, part in zip(buffers, needs, (share, 1.0 - share), strict=True):
        if need:
            buffer.copy_(part * guided)
    return buffers
