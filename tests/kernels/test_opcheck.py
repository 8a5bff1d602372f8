"""torch.library.opcheck of every registered op: schema, mutation, autograd registration, fake kernel.

The fake kernels once more on operands of other strides, and a compiled graph that relies on what they promise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import LAYOUTS
from torch import Tensor
from torch._subclasses import FakeTensorMode

import geoalign_kernels as gk
from geoalign_kernels.registration import library
from geoalign_kernels.testing import run_with_gradients

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TABLE = torch.tensor([0.9, -0.1, 0.3, 0.0], dtype=torch.float64)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def plain(*shape: int) -> Tensor:
    return torch.randn(*shape)


def calls() -> dict[str, tuple[Any, ...]]:
    """`{op: arguments}`, forward ops on leaves of autograd, the others on plain tensors."""
    x, q, phase, vector, weight = (2, 3, 12), (2, 3, 2, 6), (2, 3, 2, 2), (2, 12), (12,)
    position, heads_first = plain(3, 3), (2, 2, 3)
    prologue = (weight, weight)
    return {
        "modulated_norm": (leaf(*x), leaf(*vector), leaf(*vector), 1e-6, torch.bfloat16),
        "modulated_norm_backward": (plain(*x), plain(*x), plain(*vector), 1e-6),
        "gated_residual": (leaf(*x), leaf(*x), leaf(*vector)),
        "gated_residual_backward": (plain(*x), plain(*x), plain(*vector)),
        "unrotate_gate_norm": (leaf(*x), leaf(*x), *(leaf(*vector) for _ in range(3)), leaf(*phase), 2, 1e-6, None),
        "unrotate_gate_norm_backward": (
            *(plain(*x) for _ in range(4)), plain(*vector), plain(*vector), plain(*phase), 2, 1e-6, [True, True, True],
        ),
        "qk_norm_rotary": (
            *(leaf(*q) for _ in range(3)), *(leaf(*w) for w in prologue), position, leaf(*phase), leaf(*phase), 1e-6,
        ),
        "qk_norm_rotary_": (
            *(plain(*q) for _ in range(3)), *(plain(*w) for w in prologue), position, plain(*phase), plain(*phase),
            1e-6,
        ),
        "qk_norm_rotary_backward": (
            *(plain(*q) for _ in range(6)), *(plain(*w) for w in prologue), position, plain(*phase), plain(*phase),
            1e-6, [True] * 7,
        ),
        "flow_step": (leaf(*x), leaf(*x), TABLE, plain(*x), [], None, None, None, 1.0, None),
        "flow_log_prob": (leaf(*x), leaf(*x), plain(*x), TABLE, leaf(*x), 2.0),
        "flow_log_prob_backward": (plain(2), plain(*x), plain(*x), plain(*x), TABLE, plain(*x), 1.5, [True, True]),
        "attention": (leaf(*q), leaf(*q), leaf(*q), 0.4, "reference"),
        "attention_backward": (*(plain(*q) for _ in range(5)), plain(*heads_first), 0.4, "reference"),
        "attention_int8": (plain(*q), plain(*q), plain(*q), 0.4),
        "attention_int8_fp8": (plain(*q), plain(*q), plain(*q), 0.4),
        "rms_norm": (leaf(*x), leaf(*weight), 1e-6),
        "rms_norm_backward": (plain(*x), plain(*x), plain(*weight), 1e-6, [True, True]),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(calls()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.geoalign, name).default, calls()[name], test_utils=CHECKS)


def test_backend_of_the_other_attention_core_passes_too() -> None:
    q = leaf(2, 3, 2, 6)
    torch.library.opcheck(torch.ops.geoalign.attention.default, (q, q, q, 0.4, "sdpa_flash"), test_utils=CHECKS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*sorted(calls()), "attention by torch's core"])
def test_results_are_contiguous_as_the_fake_promises_for_any_strides(name: str, layout: str) -> None:
    """opcheck clones its operands, which undoes an expansion; here both see them as they are."""
    name, core = ("attention", "sdpa_flash") if name.startswith("attention by") else (name, "reference")
    op, change = getattr(torch.ops.geoalign, name), LAYOUTS[layout]
    args = [change(a.detach()) if isinstance(a, Tensor) and a.dim() >= 3 else a for a in calls()[name]]
    args = [core if isinstance(a, str) else a for a in args]
    with FakeTensorMode() as mode:
        promised = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    if name == "qk_norm_rotary_":
        # In place: nothing is returned. Rows that lie on one another cannot be written to.
        assert promised is None
        args = [a.clone() if isinstance(a, Tensor) and a.stride(0) == 0 else a for a in args]
    results = op(*(a.detach() if isinstance(a, Tensor) else a for a in args))
    pairs = zip(*(r if isinstance(r, tuple | list) else (r,) for r in (results, promised)), strict=True)
    for result, promise in pairs if results is not None else ():
        assert (result.shape, result.dtype) == (promise.shape, promise.dtype)
        assert result.is_contiguous() and promise.is_contiguous()


def test_a_compiled_graph_may_view_results_of_operands_in_another_layout() -> None:
    """diffusers' Wan makes tokens by ``flatten(2).transpose(1, 2)``; what follows an op is compiled for dense rows."""
    tokens = torch.randn(2, 12, 3).transpose(1, 2)
    scale, gate = torch.randn(2, 12), torch.randn(2, 12)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        x = gk.gated_residual(x, gk.modulated_norm(x, scale, scale), gate)
        stream, normed = gk.unrotate_gate_norm(x, tokens, gate, scale, scale)
        return stream.view(6, 12) * 2, gk.rms_norm(normed, scale[0]).view(2, 3, 2, 6) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        map(list, run_with_gradients(compiled, [tokens])), map(list, run_with_gradients(block, [tokens])), strict=True
    ):
        assert all(map(torch.equal, got, want))


def test_no_op_is_left_out() -> None:
    registered = {name.removeprefix("geoalign::") for name in library._op_defs}
    registered.discard("frame_preprocess")  # its checks stand in test_frame_preprocess.py, next to its inputs
    assert registered == set(calls()), "an op without an opcheck, or a check without an op"
    assert gk.report("cpu")
