"""A gradient that nobody asks for is neither computed nor allocated, nor is anything saved for it.

Every input of every op is set to require a gradient by itself, then all of them together. The calls of the backward are
recorded: an output of the backward op that was not asked for must be empty, and arithmetic outside of that op may occur
only for the vectors (gate, scale, shift) that are reduced there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import NAMES, op_cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import geoalign_kernels as gk

SHAPE = (2, 5, 3, 8, 3)
INPUTS = {
    "qk_norm_rotary": ("q", "k", "v", "weight_q", "weight_k", "phase_qk", "phase_vo"),
    "qk_norm only": ("q", "k", "weight_q", "weight_k"),
    "unrotate_gate_norm": ("y", "x", "gate", "scale", "shift", "phase"),
    "gate and norm": ("y", "x", "gate", "scale", "shift"),
    "modulated_norm": ("x", "scale", "shift"),
    "gated_residual": ("x", "y", "gate"),
    "rms_norm": ("x", "weight"),
}
# What the backward op has to fill for one input; the gradient of a gate is reduced from that of the stream.
FILLED = {"gate": {"unrotate_gate_norm": 1, "gate and norm": 1}, "scale": {}, "shift": {}}
FREE = {"detach", "view"}
"""Operators that move no data."""


class Recorder(TorchDispatchMode):
    """Names of the operators called, and the sizes that the backward ops returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.filled: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor) and t.numel() > 0]
        if namespace == "geoalign":
            self.filled += [t.numel() for t in leaves]
        elif leaves:
            self.operators.append(name.partition(".")[0])
        return result


def backward(function: Any, inputs: list[Tensor], wanted: list[int]) -> tuple[list[Tensor], Recorder, int]:
    """(gradients of the wanted inputs, what their backward called, bytes saved for it)."""
    leaves = [t.detach().clone() for t in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(*leaves)
    outputs = [o for o in ([result] if isinstance(result, Tensor) else result) if o.requires_grad]
    weights = [torch.full_like(o, 0.5).cos() for o in outputs]
    with Recorder() as recorder:
        gradients = torch.autograd.grad(outputs, [leaves[i] for i in wanted], weights)
    return list(gradients), recorder, sum(saved.values())


@pytest.mark.parametrize(("name", "place"), [(n, i) for n in NAMES for i in range(len(INPUTS[n]))], ids=str)
def test_one_gradient_alone(name: str, place: int) -> None:
    function, inputs = op_cases(torch.float32, *SHAPE)[name]
    everything, _, _ = backward(function, inputs, list(range(len(inputs))))
    (alone,), recorder, _ = backward(function, inputs, [place])
    assert torch.equal(alone, everything[place])
    which = INPUTS[name][place]
    expected = FILLED.get(which, {}).get(name, 0 if which in FILLED else 1)
    if name == "gated_residual" and which == "x":
        expected = 0  # its gradient is the incoming one
    assert len(recorder.filled) == expected, f"filled {recorder.filled}"
    if which not in FILLED and not which.startswith("phase"):  # phases may be summed over heads and samples
        assert set(recorder.operators) <= FREE, recorder.operators


def test_frozen_phases_and_gates_save_no_value_and_no_branch() -> None:
    for name, place, role in (
        ("qk_norm_rotary", 2, "phase_vo"), ("unrotate_gate_norm", 0, "phase"), ("gated_residual", 1, "gate"),
    ):  # fmt: skip
        function, inputs = op_cases(torch.float32, *SHAPE)[name]
        names = INPUTS[name]
        frozen = [i for i, n in enumerate(names) if not n.startswith(("phase", "gate"))]
        _, _, without = backward(function, inputs, frozen)
        _, _, trained = backward(function, inputs, sorted([*frozen, names.index(role)]))
        assert trained - without == 4 * inputs[place].numel(), name


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
def test_log_prob_fills_the_wanted_velocities_only(wanted: tuple[int, ...]) -> None:
    x, x_next = torch.randn(2, 3, 7).unbind(0)
    velocities = list(torch.randn(2, 3, 7).to(torch.bfloat16).unbind(0))

    def density(v: Tensor, u: Tensor) -> Tensor:
        return gk.flow_log_prob(x, v, x_next, (0.98, -0.04, 0.3, 0.0), velocity_uncond=u, guidance=3.0)

    everything, _, _ = backward(density, velocities, [0, 1])
    gradients, recorder, _ = backward(density, velocities, list(wanted))
    assert recorder.filled == [x.numel()] * len(wanted) and set(recorder.operators) <= FREE, recorder.operators
    for i, gradient in zip(wanted, gradients, strict=True):
        assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, everything[i])


def test_a_step_scales_the_gradient_for_wanted_operands_only() -> None:
    x, velocity, noise = torch.randn(3, 2, 5).unbind(0)
    step = lambda *t: gk.flow_step(t[0], t[1], (0.9, -0.1, 0.3, 0.0), noise=t[2]).x_next  # noqa: E731
    for place, factor in enumerate((0.9, -0.1, 0.3)):
        (gradient,), recorder, _ = backward(step, [x, velocity, noise], [place])
        assert torch.equal(gradient, factor * torch.full_like(x, 0.5).cos())
        assert recorder.operators.count("mul") == 1
