"""The row ops against closed forms, autograd's finite differences and torch's own layers (CPU reference)."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import NAMES, op_cases

import geoalign_kernels as gk
from geoalign_kernels.testing import assert_gradients_match, assert_matches_reference


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    function, inputs = op_cases(torch.float64, 2, 4, 2, 6, 2)[name]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("name", NAMES)
def test_registration_passes_opcheck(name: str) -> None:
    function, inputs = op_cases(torch.float32, 2, 4, 2, 6, 2)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    eager, graph = function(*inputs), compiled(*[t.clone().requires_grad_() for t in inputs])
    for a, b in zip(torch.utils._pytree.tree_leaves(eager), torch.utils._pytree.tree_leaves(graph), strict=True):
        assert torch.equal(a, b)


def test_modulated_norm_is_torchs_layer_norm() -> None:
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(12), torch.randn(12)
    truth = torch.nn.functional.layer_norm(x.double(), (12,), weight.double(), bias.double(), eps=1e-6)
    eager = torch.nn.functional.layer_norm(x, (12,), weight, bias, eps=1e-6)
    assert_matches_reference(gk.modulated_norm(x, weight - 1.0, bias), truth, eager)


def test_rotation_is_complex_multiplication() -> None:
    """RMSNorm, then exp(i(position + phase)) on the last pairs, in complex128."""
    (function, inputs), heads, head = op_cases(torch.float64, 2, 5, 3, 8, 3)["qk_norm_rotary"], 3, 8
    q, _, v, weight_q, _, phase_qk, phase_vo = inputs
    generator_position = op_cases(torch.float64, 2, 5, 3, 8, 3)["qk_norm_rotary"][0].__closure__
    position = next(c.cell_contents for c in generator_position if isinstance(c.cell_contents, torch.Tensor))
    rms = torch.nn.functional.rms_norm(q.flatten(2), (heads * head,), weight_q, eps=1e-6).view_as(q)
    angle = position[:3, None] + torch.nn.functional.pad(phase_qk[:, :3], (1, 0))
    pair = torch.view_as_complex(rms.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    turned_v = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
    turned_v = turned_v * torch.exp(-1j * torch.nn.functional.pad(phase_vo, (1, 0)))
    q_out, _, v_out = function(*inputs)
    torch.testing.assert_close(q_out, torch.view_as_real(pair).flatten(-2), rtol=0, atol=1e-13)
    torch.testing.assert_close(v_out, torch.view_as_real(turned_v).flatten(-2), rtol=0, atol=1e-13)


def test_zero_phases_change_nothing_and_inplace_equals_out_of_place() -> None:
    q, k, v = (torch.randn(1, 4, 2, 6) for _ in range(3))
    weight, position, zero = torch.rand(12), torch.rand(4, 3), torch.zeros(1, 4, 2, 2)
    plain = gk.qk_norm_rotary(q, k, v, weight, weight, position)
    camera = gk.qk_norm_rotary(q, k, v, weight, weight, position, phase_qk=zero, phase_vo=zero)
    assert all(torch.equal(a, b) for a, b in zip(plain, camera, strict=True))
    for a, b in zip(gk.qk_norm_rotary(q, k, v, weight, weight, position, inplace=True), plain, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="inplace"):
        gk.qk_norm_rotary(q.requires_grad_(), k, v, weight, weight, position, inplace=True)


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="scale must be"):
        gk.modulated_norm(x, torch.zeros(3, 8), torch.zeros(8))
    with pytest.raises(ValueError, match="phase must be"):
        gk.unrotate_gate_norm(x, x, *[torch.zeros(8)] * 3, phase=torch.zeros(2, 4, 2, 2), heads=2)


def test_missing_gradient_is_detected() -> None:
    truth = [torch.ones(4, 3)]
    with pytest.raises(AssertionError, match=r"rows \[3\] are missing"):
        assert_gradients_match([torch.cat([torch.ones(3, 3), torch.zeros(1, 3)])], truth, tolerance=0.6)


def test_norms_are_written_in_the_dtype_of_what_reads_them() -> None:
    """One rounding of the float32 norm; the stream and its gradient keep their own dtype."""
    x, y = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 12).bfloat16().requires_grad_()
    gate, scale, shift = torch.randn(3, 2, 12).unbind(0)
    wide, narrow = (gk.modulated_norm(x, scale, shift, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert wide.dtype == torch.float32 and torch.equal(narrow, wide.bfloat16())
    stream, normed = gk.unrotate_gate_norm(y, x, gate, scale, shift, heads=2, dtype=torch.bfloat16)
    assert stream.dtype == torch.float32 and normed.dtype == torch.bfloat16
    assert torch.equal(normed, gk.modulated_norm(stream, scale, shift).bfloat16())
    dx, dy = torch.autograd.grad(normed.float().square().sum(), [x, y])
    assert dx.dtype == torch.float32 and dy.dtype == torch.bfloat16
