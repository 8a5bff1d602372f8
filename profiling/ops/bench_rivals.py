"""What the kernels are compared with: the published formulation, a compiled real-valued rewrite, libraries.

Every function takes the operands of the op in the order of its case in `bench_cases.py`. Libraries have their
adapters in `bench_libraries.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional

from geoalign_kernels.ops.gated_residual import reference as gate_reference
from geoalign_kernels.ops.modulated_norm import reference as norm_reference
from geoalign_kernels.ops.qk_norm_rotary import reference as rotary_reference
from geoalign_kernels.ops.rms_norm import reference as rms_reference
from geoalign_kernels.ops.unrotate_gate_norm import reference as epilogue_reference

EPS = 1e-6
Implementation = Callable[..., Any]


def compiled(function: Implementation, device: torch.device) -> Implementation:
    """`torch.compile` of a plain function; without a device only traced, since nothing is timed there."""
    functorch_config.donated_buffer = False  # the timed backward runs many times over one graph
    return torch.compile(function, backend="inductor" if device.type == "cuda" else "aot_eager", dynamic=False)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotation as published (Wan, ReDirector): adjacent pairs as complex128, times a unit phasor, cast back."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


def _padded(phase: Tensor, pairs: int) -> Tensor:
    return functional.pad(phase.double(), (pairs - phase.shape[-1], 0))


def published_prologue(
    q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, position: Tensor, phase_qk: Tensor, phase_vo: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm through float32, position and camera rotations one after the other in complex128."""
    turned = []
    for x, weight in ((q, wq), (k, wk)):
        wide = x.flatten(2).float()
        unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight
        turned.append(_turn(_turn(unit.view_as(x), position.double()[:, None]), _padded(phase_qk, x.shape[-1] // 2)))
    return turned[0], turned[1], _turn(v, -_padded(phase_vo, v.shape[-1] // 2))


def published_epilogue(
    y: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, phase: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotation in complex128, gate and residual in float32, LayerNorm and modulation."""
    heads = y.unflatten(-1, (phase.shape[2], -1))
    branch = _turn(heads, _padded(phase, heads.shape[-1] // 2)).flatten(2)
    stream = (x.float() + gate[:, None] * branch.float()).to(x.dtype)
    return stream, published_norm(stream, scale, shift, y.dtype)


def published_norm(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm in float32, then the modulation, then a cast."""
    unit = functional.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (unit * (1.0 + scale[:, None]) + shift[:, None]).to(dtype)


def published_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm through float32, the weight after the cast back."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def published_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate through float32."""
    return (x.float() + y.float() * gate[:, None]).to(x.dtype)


def rewritten_prologue(*operands: Tensor) -> Any:
    """The real-valued rewrite that a compiler can fuse."""
    return rotary_reference.qk_norm_rotary(*operands, EPS)


def rewritten_epilogue(dtype: torch.dtype) -> Implementation:
    """The real-valued rewrite of the epilogue with the norm in `dtype`."""

    def epilogue(y: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, phase: Tensor) -> Any:
        return epilogue_reference.unrotate_gate_norm(y, x, gate, scale, shift, phase, phase.shape[2], EPS, dtype)

    return epilogue


def rewritten_norm(dtype: torch.dtype) -> Implementation:
    """LayerNorm and modulation in one expression, in `dtype`."""
    return lambda x, scale, shift: norm_reference.modulated_norm(x, scale, shift, EPS, dtype)


def rewritten_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in one expression."""
    return rms_reference.rms_norm(x, weight, EPS)


rewritten_gate = gate_reference.gated_residual
