"""``flow_step``, ``flow_log_prob``: public functions, validation, registration.

Differentiability: ``flow_step`` is linear in x, velocity, velocity_uncond, noise and m_prev and differentiable in all
of them; ``flow_log_prob`` is differentiable in the velocities only, because a replay holds both states fixed.
Determinism: bitwise, per device and batch shape. The log-density of a step is always reduced from the stored x' by the
very routine that the replay calls, so the ratio of an unchanged policy is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.ops.flow_step import reference
from geoalign_kernels.philox import MASK32, NoiseKey
from geoalign_kernels.registration import define
from geoalign_kernels.rows import working_dtype

_HERE = "geoalign_kernels.ops.flow_step"
for _name in ("flow_step", "flow_log_prob", "flow_log_prob_backward"):
    dispatch.register(_name, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}")


class FlowStep(NamedTuple):
    """Result of one sampler step."""

    x_next: Tensor
    """[B, ...] float32."""
    log_prob: Tensor | None
    """[B] float32, mean over elements; None for a deterministic step (c = 0)."""


def flow_step(
    x: Tensor,
    velocity: Tensor,
    coefficients: Tensor | Sequence[float],
    *,
    noise: Tensor | None = None,
    key: NoiseKey | None = None,
    velocity_uncond: Tensor | None = None,
    guidance: float = 1.0,
    m_prev: Tensor | None = None,
) -> FlowStep:
    """One step of any sampler of the affine family: x' = a x + b v + c eps + d m_prev.

    v = velocity_uncond + guidance (velocity - velocity_uncond) if ``velocity_uncond`` is given, else ``velocity``.

    Args:
        x: state [B, ...], float32 (float64 for checks).
        velocity: like x, any floating dtype; raised to float32.
        coefficients: (a, b, c, d), [4] for all samples or [B, 4], float64 numbers on the host.
        noise: eps like x; or
        key: names eps by counter; exactly one of the two is needed when c != 0, neither is read when c = 0.
        velocity_uncond: like velocity.
        guidance: scale of classifier-free guidance.
        m_prev: like x; the state that multistep samplers carry.

    Returns:
        x' in float32 (float64 for float64 states) and, when c != 0 and m_prev is None, its log-density.

    Raises:
        ValueError: shapes differ, coefficients are not host numbers, or noise is missing or given twice.
    """
    table = _table(coefficients, x)
    for name, value in (
        ("velocity", velocity), ("noise", noise), ("velocity_uncond", velocity_uncond), ("m_prev", m_prev),
    ):  # fmt: skip
        _same_shape(name, value, x)
    stochastic = _is_stochastic(table)
    if stochastic and (noise is None) == (key is None):
        raise ValueError("a stochastic step (c != 0) needs exactly one of noise= and key=")
    if stochastic and key is not None:
        words = [key.seed & MASK32, key.iteration, key.step, key.stream]
        group, sample = (ids.to(x.device) for ids in key.lanes(x.shape[0]))
    else:
        words, group, sample = [], None, None
    noise = noise if stochastic else None
    x_next = torch.ops.geoalign.flow_step(
        x, velocity, table, noise, words, group, sample, velocity_uncond, guidance, m_prev
    )
    if not stochastic or m_prev is not None:
        return FlowStep(x_next, None)
    log_prob = flow_log_prob(x, velocity, x_next, table, velocity_uncond=velocity_uncond, guidance=guidance)
    return FlowStep(x_next, log_prob)


def flow_log_prob(
    x: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    coefficients: Tensor | Sequence[float],
    *,
    velocity_uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Mean over elements of ln N(x_next; a x + b v, c^2), constants included: [B] float32.

    Differentiable with respect to ``velocity`` (and ``velocity_uncond``): d/dv = b (x_next - a x - b v) / (c^2 n) for n
    elements per sample. Arguments as in ``flow_step``; ``x_next`` is the stored state.

    Raises:
        ValueError: shapes differ, coefficients are not host numbers, or c = 0 (a deterministic step has no density).
    """
    table = _table(coefficients, x)
    for name, value in (("velocity", velocity), ("x_next", x_next), ("velocity_uncond", velocity_uncond)):
        _same_shape(name, value, x)
    if not _is_stochastic(table):
        raise ValueError("flow_log_prob of a deterministic step: coefficient c is 0")
    return torch.ops.geoalign.flow_log_prob(x.detach(), velocity, x_next.detach(), table, velocity_uncond, guidance)


def _table(coefficients: Tensor | Sequence[float], x: Tensor) -> Tensor:
    table = torch.as_tensor(coefficients, dtype=torch.float64)
    if table.device.type != "cpu":
        raise ValueError("coefficients must be host numbers (a CPU tensor): reading them back would stall the device")
    if table.shape not in ((4,), (x.shape[0], 4)):
        raise ValueError(f"coefficients must be [4] or [{x.shape[0]}, 4], got {list(table.shape)}")
    return table


def _is_stochastic(table: Tensor) -> bool:
    nonzero = table.reshape(-1, 4)[:, 2] != 0
    if bool(nonzero.any()) != bool(nonzero.all()):
        raise ValueError("one call mixes stochastic (c != 0) and deterministic (c = 0) samples; split it")
    return bool(nonzero.any())


def _same_shape(name: str, value: Tensor | None, x: Tensor) -> None:
    if value is not None and (value.shape != x.shape or value.device != x.device):
        raise ValueError(
            f"{name} must be like x ({list(x.shape)} on {x.device}), got {list(value.shape)} on {value.device}"
        )


def _step_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=working_dtype(x))


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, velocity, ctx.table, noise, _, _, _, velocity_uncond, ctx.guidance, m_prev = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (x, velocity, noise, velocity_uncond, m_prev)]


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b, c, d = (column.to(grad) for column in _columns(ctx.table, grad))
    x, velocity, noise, uncond, m_prev = ctx.dtypes
    need_x, need_v, _, need_noise, _, _, _, need_uncond, _, need_m = ctx.needs_input_grad
    share = ctx.guidance if uncond is not None else 1.0

    def scaled(column: Tensor, factor: float, dtype: torch.dtype | None, need: bool) -> Tensor | None:
        if not need:
            return None
        return ((column if factor == 1.0 else factor * column) * grad).to(dtype)

    return (
        scaled(a, 1.0, x, need_x), scaled(b, share, velocity, need_v), None, scaled(c, 1.0, noise, need_noise), None,
        None, None, scaled(b, 1.0 - share, uncond, need_uncond), None, scaled(d, 1.0, m_prev, need_m),
    )  # fmt: skip


def _columns(table: Tensor, like: Tensor) -> list[Tensor]:
    return [column.reshape(-1, *[1] * (like.dim() - 1)) for column in table.reshape(-1, 4).unbind(1)]


def _log_prob_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=working_dtype(x))


def _log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, velocity, x_next, table, velocity_uncond, ctx.guidance = inputs
    ctx.save_for_backward(x, velocity, x_next, table, velocity_uncond)


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, velocity, x_next, table, uncond = ctx.saved_tensors
    _, need_v, _, _, need_u, _ = ctx.needs_input_grad
    needs = [need_v, need_u]
    dv, du = torch.ops.geoalign.flow_log_prob_backward(
        grad, x, velocity, x_next, table, uncond, ctx.guidance, needs
    )  # fmt: skip
    return None, dv if need_v else None, None, None, du if need_u else None, None


def _log_prob_backward_fake(grad: Tensor, x: Tensor, velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, velocity_uncond, _, needs = rest
    return reference.gradient_buffers(velocity, velocity_uncond, needs)


define(
    "flow_step",
    "(Tensor x, Tensor velocity, Tensor coefficients, Tensor? noise, int[] key, Tensor? group, Tensor? sample, "
    "Tensor? velocity_uncond, float guidance, Tensor? m_prev) -> Tensor",
    fake=_step_fake,
    backward=_step_backward,
    setup_context=_step_context,
)
define(
    "flow_log_prob",
    "(Tensor x, Tensor velocity, Tensor x_next, Tensor coefficients, Tensor? velocity_uncond, "
    "float guidance) -> Tensor",
    fake=_log_prob_fake,
    backward=_log_prob_backward,
    setup_context=_log_prob_context,
)
define(
    "flow_log_prob_backward",
    "(Tensor grad, Tensor x, Tensor velocity, Tensor x_next, Tensor coefficients, Tensor? velocity_uncond, "
    "float guidance, bool[] needs) -> (Tensor, Tensor)",
    fake=_log_prob_backward_fake,
)
