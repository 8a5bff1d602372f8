"""Input cases of the kernel tests, shared between the reference, interpreter and GPU suites."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import geoalign_kernels as gk

Case = tuple[Callable[..., tuple[Tensor, ...] | Tensor], list[Tensor]]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch inside tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),  # as flatten(2).transpose(1, 2) gives
    "slice of wider rows": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "one sample for all": lambda x: x[:1].expand_as(x),
}
"""A tensor [B, S, ...] in other strides; all but the last keep its values."""


def op_cases(dtype: torch.dtype, batch: int, tokens: int, heads: int, head: int, pairs: int) -> dict[str, Case]:
    """`{name: (function, differentiable inputs)}` of every row op on random inputs."""
    generator = torch.Generator().manual_seed(7)
    width = heads * head

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    position = 20.0 * torch.rand(tokens, head // 2, generator=generator, dtype=torch.float64).to(dtype)
    packed = rand(batch, tokens, 3, heads, head)
    q, k, v = packed[:, : max(tokens - 2, 0), 0], packed[:, :, 1], packed[:, :, 2]
    weights = [1.0 + 0.1 * rand(width), 1.0 + 0.1 * rand(width)]
    phase_qk, phase_vo = rand(1, tokens, heads, pairs), rand(batch, tokens, 1, pairs)
    y, x, gate, scale, shift = rand(batch, tokens, width), rand(batch, tokens, width), rand(batch, width), rand(
        1, width), rand(width)  # fmt: skip
    return {
        "qk_norm_rotary": (
            lambda q, k, v, a, b, p, r: gk.qk_norm_rotary(q, k, v, a, b, position, phase_qk=p, phase_vo=r),
            [q, k, v, *weights, phase_qk, phase_vo],
        ),
        "qk_norm only": (lambda q, k, a, b: gk.qk_norm_rotary(q, k, k, a, b, None)[:2], [q, k, *weights]),
        "unrotate_gate_norm": (
            lambda y, x, g, a, b, p: gk.unrotate_gate_norm(y, x, g, a, b, phase=p, heads=heads),
            [y, x, gate, scale, shift, phase_vo],
        ),
        "gate and norm": (lambda *t: gk.unrotate_gate_norm(*t, heads=heads), [y, x, gate, scale, shift]),
        "modulated_norm": (gk.modulated_norm, [x, scale, shift]),
        "gated_residual": (gk.gated_residual, [x, y, gate]),
        "rms_norm": (gk.rms_norm, [rand(batch, tokens, 2, width)[:, :, 1], weights[0]]),
    }


NAMES = (
    "qk_norm_rotary",
    "qk_norm only",
    "unrotate_gate_norm",
    "gate and norm",
    "modulated_norm",
    "gated_residual",
    "rms_norm",
)
