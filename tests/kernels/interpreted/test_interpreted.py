"""Triton kernels in its CPU interpreter, float32, against the float64 reference: odd shapes, masks, strides, empties.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/interpreted`: Triton reads the flag when a kernel is decorated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from kernel_cases import NAMES, op_cases
from philox_kernel import assert_words_equal
from scipy import stats
from triton.runtime import interpreter

import geoalign_kernels as gk
from geoalign_kernels.ops.attention import triton_impl
from geoalign_kernels.philox import NORMAL_ATOL
from geoalign_kernels.testing import assert_gradients_match, assert_matches_reference, run_with_gradients

pytestmark = pytest.mark.interp
SHAPES = ((2, 5, 3, 16, 5), (1, 7, 6, 32, 11))  # batch, tokens, heads, head size, phases: tails, odd and even phases


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    function, inputs = op_cases(torch.float32, *shape)[name]
    truth_function, truth_inputs = op_cases(torch.float64, *shape)[name]
    truth, truth_gradients = run_with_gradients(truth_function, truth_inputs)
    eager, _ = run_with_gradients(function, inputs)
    with gk.use_backend("triton"):
        actual, gradients = run_with_gradients(function, inputs)
    for index, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
        assert_matches_reference(a, t, e, name=f"output {index}")
    assert_gradients_match(gradients, truth_gradients, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_empty_input(name: str) -> None:
    function, inputs = op_cases(torch.float32, 1, 0, 2, 16, 4)[name]
    with gk.use_backend("triton"):
        outputs, _ = run_with_gradients(function, inputs)
    assert all(o.numel() == 0 for o in outputs)


@pytest.mark.parametrize(
    ("name", "places"),
    [("qk_norm_rotary", (0, 4, 6)), ("unrotate_gate_norm", (0, 1, 5)), ("gated_residual", (1,)), ("rms_norm", (0, 1))],
)
def test_one_gradient_alone_equals_that_among_all(name: str, places: tuple[int, ...]) -> None:
    """A kernel compiled without the other gradients computes the same numbers."""
    function, inputs = op_cases(torch.float32, 1, 3, 2, 16, 3)[name]
    with gk.use_backend("triton"):
        _, everything = run_with_gradients(function, inputs)
        for place in places:
            leaves = [t.detach().clone().requires_grad_(i == place) for i, t in enumerate(inputs)]
            result = function(*leaves)
            outputs = [result] if isinstance(result, torch.Tensor) else list(result)
            generator = torch.Generator().manual_seed(0)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
            pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
            (gradient,) = torch.autograd.grad([o for o, _ in pairs], leaves[place], [w for _, w in pairs])
            assert torch.equal(gradient, everything[place]), f"{name}: input {place}"


def test_strided_inputs_and_inplace() -> None:
    packed = torch.randn(2, 5, 3, 2, 16)
    q, k, v = packed.unbind(2)
    weight, position, phase = torch.rand(32), torch.rand(5, 8), torch.rand(1, 5, 2, 3)
    expected = gk.qk_norm_rotary(q, k, v, weight, weight, position, phase_qk=phase, phase_vo=phase)
    with gk.use_backend("triton"):
        gk.qk_norm_rotary(q, k, v, weight, weight, position, phase_qk=phase, phase_vo=phase, inplace=True)
    for got, want in zip(packed.unbind(2), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=4e-6)


def test_unsupported_width_is_refused_when_named() -> None:
    x = torch.zeros(1, 2, 17)
    with gk.use_backend("triton"), pytest.raises(ValueError, match="power-of-two"):
        gk.gated_residual(x, x, x[:, 0])


def test_flow_step_noise_and_density() -> None:
    table = (0.98, -0.04, 0.3, 0.0)
    key = gk.NoiseKey(0xFEDCBA9876, 3, torch.tensor([1, 9]), torch.tensor([0, 4]), 5)
    x, velocity, other = torch.randn(3, 2, 3, 421).unbind(0)
    zero, extra = torch.zeros_like(x), {"velocity_uncond": other, "guidance": 3.0}
    expected = gk.flow_step(x, velocity, table, key=key, **extra)
    noise = gk.philox_normal(x.shape[1:], key)
    with gk.use_backend("triton"):
        got = gk.flow_step(x, velocity, table, key=key, **extra)
        replay = gk.flow_log_prob(x, velocity, got.x_next, table, **extra)
        got_noise = gk.flow_step(zero, zero, (0.0, 0.0, 1.0, 0.0), key=key).x_next
        _, got_gradient = run_with_gradients(lambda v: gk.flow_log_prob(x, v, got.x_next, table), [velocity])
        ode = gk.flow_step(x, velocity, (1.0, -0.1, 0.0, 0.2), m_prev=other).x_next
    assert torch.equal(got.log_prob, replay)
    assert (got_noise - noise).abs().max() <= NORMAL_ATOL
    torch.testing.assert_close(got.x_next, expected.x_next, rtol=0, atol=4e-6)
    _, gradient = run_with_gradients(lambda v: gk.flow_log_prob(x, v, got.x_next, table), [velocity])
    assert_gradients_match(got_gradient, gradient, tolerance=1e-5)
    torch.testing.assert_close(ode, x - 0.1 * velocity + 0.2 * other, rtol=0, atol=2e-6)


def test_noise_of_the_kernel_is_normal() -> None:
    """Kolmogorov-Smirnov; the seed is fixed, so a correct generator fails with probability 1e-3 once, at its choice."""
    zero = torch.zeros(2, 20_000)
    with gk.use_backend("triton"):
        noise = gk.flow_step(zero, zero, (0.0, 0.0, 1.0, 0.0), key=gk.NoiseKey(11, 0, 0, torch.arange(2), 0)).x_next
    assert stats.kstest(noise.double().numpy().ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_empty_steps(shape: tuple[int, int]) -> None:
    x, table = torch.zeros(shape), (0.9, -0.1, 0.3, 0.0)
    with gk.use_backend("triton"):
        step = gk.flow_step(x, x, table, key=gk.NoiseKey(1, 2, 3, torch.arange(shape[0]), 4))
        _, (gradient,) = run_with_gradients(lambda v: gk.flow_log_prob(x, v, x, table), [x])
    assert step.x_next.shape == shape and step.log_prob.shape == shape[:1] and gradient.shape == shape


def test_philox_words_of_the_kernel_are_the_reference_words() -> None:
    assert_words_equal("cpu", 256)


@pytest.mark.parametrize("target", triton_impl.TILES)
@pytest.mark.parametrize("lengths", [(5, 3), (130, 150), (1, 32), (64, 129)], ids=str)
def test_attention_kernel(lengths: tuple[int, int], target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop: none, one or several blocks behind the last one, which may be full."""
    monkeypatch.setattr(triton_impl, "tile", lambda device, fp8: triton_impl.TILES[target])
    q, k, v = (torch.randn(1, n, 2, 32) for n in (lengths[0], lengths[1], lengths[1]))
    truth = gk.attention(q.double(), k.double(), v.double(), core="reference")
    eager = gk.attention(q, k, v, core="reference")
    with gk.use_backend("triton"):
        got, gradients = gk.attention(q, k, v), run_with_gradients(lambda *t: gk.attention(*t).out, [q, k, v])[1]
        quantised = gk.attention(q, k, v, mode="int8").out
    assert_matches_reference(got.out, truth.out, eager.out)
    assert_matches_reference(got.lse, truth.lse, eager.lse, name="lse")
    expected = run_with_gradients(
        lambda *t: gk.attention(*t, core="reference").out, [q.double(), k.double(), v.double()]
    )
    assert_gradients_match(gradients, expected[1], tolerance=1e-5)
    emulated = gk.attention(q, k, v, mode="int8").out
    # Halves round differently in the two quantisers: one level of 1/127 in a few entries.
    assert (quantised - emulated).norm() <= 5e-3 * emulated.norm()


def test_attention_kernel_reads_values_that_lie_apart_from_the_keys() -> None:
    q, k = (torch.randn(2, n, 2, 32) for n in (7, 70))
    v = torch.randn(2, 70, 3, 2, 32)[:, :, 1]
    with gk.use_backend("triton"):
        got = gk.attention(q, k, v)
    truth = gk.attention(q.double(), k.double(), v.double(), core="reference")
    assert_matches_reference(got.out, truth.out, gk.attention(q, k, v, core="reference").out)


@pytest.fixture
def exact_fp8_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.6 to 3.9) loses the carry where rounding to fp8 reaches the next power of two: 1.99 becomes 1.
    Casts from float32 go through torch here."""
    convert = interpreter._convert_float

    def cast(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(data.copy()).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", cast)


@pytest.mark.parametrize("lengths", [(5, 3), (130, 150)], ids=str)
@pytest.mark.usefixtures("exact_fp8_casts")
def test_attention_kernel_with_fp8_values(lengths: tuple[int, int]) -> None:
    """The kernel rounds probabilities relative to the largest of the keys so far, the reference to that of all keys:
    where the two are not a power of two apart, p lands on another fp8 neighbour. Both err by 2.5 % (see
    test_attention.py), independently, in up to all probabilities of a row whose first block misses its maximum."""
    q, k, v = (torch.randn(1, n, 2, 32) for n in (*lengths, lengths[1]))
    emulated = gk.attention(q, k + 3.0, v + 1.0, mode="int8_fp8").out
    with gk.use_backend("triton"):
        got = gk.attention(q, k + 3.0, v + 1.0, mode="int8_fp8").out
    around = emulated - (v + 1.0).mean(1, keepdim=True)  # fp8 rounds what is left beside the mean
    bound = 1e-3 if lengths[1] <= 128 else 2**0.5 * 0.0255
    assert (got - emulated).norm() <= bound * around.norm()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "int8", "int8_fp8"])
def test_attention_of_empty_sequences(mode: str, lengths: tuple[int, int]) -> None:
    q, k, v = torch.randn(1, lengths[0], 2, 32), *torch.randn(2, 1, lengths[1], 2, 32)
    with gk.use_backend("triton"):
        assert torch.equal(gk.attention(q, k, v, mode=mode).out, torch.zeros_like(q))
