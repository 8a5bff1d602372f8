"""The kernels on a CUDA device: tolerance rule against float64, noise, exact replay, every attention core by itself.

Rule: max|K - R| <= factor * max|E - R| + floor, with K the kernel, R the reference in float64 and E the reference in
the dtype of K; the factor is 2 for outputs and 3 for gradients (`geoalign_kernels.testing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import NAMES, op_cases
from philox_kernel import assert_words_equal
from torch.nn.attention import SDPBackend, sdpa_kernel

import geoalign_kernels as gk
from geoalign_kernels.ops.attention.cores import CORES, REPEATABLE, why_not
from geoalign_kernels.ops.attention.fp8_support import why_not_fp8
from geoalign_kernels.philox import NORMAL_ATOL
from geoalign_kernels.testing import assert_gradients_match, assert_matches_reference, run_with_gradients

pytestmark = pytest.mark.gpu
SHAPES = ((1, 515, 12, 128, 42), (2, 37, 3, 16, 5))  # batch, tokens, heads, head size, phases: production width, tails
TABLE = (0.98, -0.04, 0.3, 0.0)
DTYPES = (torch.float32, torch.bfloat16)


def case_on(device: str, name: str, dtype: torch.dtype, values: torch.dtype, shape: tuple[int, ...]) -> Any:
    """(function, inputs) in `dtype` holding the values of `values`, so that all precisions see the same numbers."""
    # The positions are no input of a case but a variable it encloses.
    function, inputs = op_cases(values, *shape)[name]
    cells = [c for c in function.__closure__ or () if isinstance(c.cell_contents, torch.Tensor)]
    for cell in cells:
        cell.cell_contents = cell.cell_contents.float().to(device, torch.promote_types(dtype, torch.float32))
    return function, [t.to(device, dtype) for t in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_row_ops(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    function, inputs = case_on("cuda", name, dtype, dtype, shape)
    exact_function, exact_inputs = case_on("cuda", name, torch.float64, dtype, shape)
    with gk.use_backend("reference"):
        truth, truth_gradients = run_with_gradients(exact_function, exact_inputs)
        eager, eager_gradients = run_with_gradients(function, inputs)
    with gk.use_backend("triton"):
        outputs, gradients = run_with_gradients(function, inputs)
    for index, (k, r, e) in enumerate(zip(outputs, truth, eager, strict=True)):
        assert_matches_reference(k, r, e, name=f"output {index}")
    for index, (k, r, e) in enumerate(zip(gradients, truth_gradients, eager_gradients, strict=True)):
        # vectors are summed over samples and tokens, phases at most over samples and heads
        terms = shape[0] * (shape[1] if k.dim() <= 2 else shape[2])
        assert_matches_reference(k, r, e, name=f"gradient {index}", factor=3.0, terms=terms)


@pytest.mark.parametrize("name", NAMES)
def test_row_ops_repeat_bit_for_bit(name: str) -> None:
    function, inputs = case_on("cuda", name, torch.bfloat16, torch.bfloat16, SHAPES[0])
    first, second = (run_with_gradients(function, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_inplace_prologue_equals_out_of_place() -> None:
    packed = torch.randn(1, 130, 3, 12, 128, device="cuda", dtype=torch.bfloat16)
    weight, position = torch.rand(1536, device="cuda"), torch.rand(130, 64, device="cuda")
    phase = torch.randn(1, 130, 12, 42, device="cuda")
    arguments = {"phase_qk": phase, "phase_vo": phase}
    expected = gk.qk_norm_rotary(*packed.unbind(2), weight, weight, position, **arguments)
    gk.qk_norm_rotary(*packed.unbind(2), weight, weight, position, **arguments, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(packed.unbind(2), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone_equals_that_among_all(name: str) -> None:
    """Kernels compiled without the other gradients may contract a multiply-add elsewhere: an ulp of float32, which
    moves a bfloat16 by one step (2^-8) at most."""
    function, inputs = case_on("cuda", name, torch.bfloat16, torch.bfloat16, SHAPES[0])
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    weights = [torch.randn_like(o) for o in outputs]
    everything = torch.autograd.grad(outputs, leaves, weights)
    for place, expected in enumerate(everything):
        leaves = [t.detach().clone().requires_grad_(i == place) for i, t in enumerate(inputs)]
        outputs = function(*leaves)
        pairs = zip([outputs] if isinstance(outputs, torch.Tensor) else outputs, weights, strict=True)
        kept = [(o, w) for o, w in pairs if o.requires_grad]
        (alone,) = torch.autograd.grad([o for o, _ in kept], leaves[place], [w for _, w in kept])
        error = (alone.double() - expected.double()).norm() / expected.double().norm()
        assert error <= 2.0**-8, f"{name}: input {place}: {error:.1e}"


@pytest.mark.parametrize("name", ["unrotate_gate_norm", "modulated_norm"])
def test_float32_stream_with_bfloat16_norm(name: str) -> None:
    """The residual stream is float32, what feeds the next product bfloat16: the float32 norm rounded once. Two kernels
    may contract a multiply-add differently: the stream to 2 ulp of float32, a rounding of the norm flips now and then.
    """
    batch, tokens, heads, head, pairs = SHAPES[0]
    y = torch.randn(batch, tokens, heads * head, device="cuda").bfloat16()
    x = torch.randn(batch, tokens, heads * head, device="cuda")
    gate, scale, shift = (torch.randn(batch, heads * head, device="cuda") for _ in range(3))
    phase = torch.randn(batch, tokens, heads, pairs, device="cuda").bfloat16()

    def run(dtype: torch.dtype | None) -> list[torch.Tensor]:
        if name == "modulated_norm":
            return [gk.modulated_norm(x, scale, shift, dtype=dtype)]
        return list(gk.unrotate_gate_norm(y, x, gate, scale, shift, phase=phase, heads=heads, dtype=dtype))

    *streams, wide = run(None)
    *same, narrow = run(torch.bfloat16)
    for a, b in zip(streams, same, strict=True):
        torch.testing.assert_close(a, b, rtol=2.4e-7, atol=1e-6)
    assert narrow.dtype == torch.bfloat16
    assert (narrow != wide.bfloat16()).double().mean() <= 1e-3
    torch.testing.assert_close(narrow.float(), wide, rtol=2.0**-8, atol=1e-6)


def test_philox_words_are_those_of_the_cpu_bit_for_bit() -> None:
    assert_words_equal("cuda", 4096)


def test_a_step_can_be_captured_in_a_cuda_graph() -> None:
    """No copy from pageable memory is left in a warm call: coefficients stay on the device."""
    x, velocity = torch.randn(2, 5, 4001, device="cuda"), torch.randn(2, 5, 4001, device="cuda").bfloat16()
    ids = torch.arange(2, device="cuda")
    key = gk.NoiseKey(1, 2, torch.zeros_like(ids), ids, 4)
    expected = gk.flow_step(x, velocity, TABLE, key=key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = gk.flow_step(x, velocity, TABLE, key=key)
    graph.replay()
    assert torch.equal(step.x_next, expected.x_next) and torch.equal(step.log_prob, expected.log_prob)


def test_noise_is_that_of_the_cpu() -> None:
    """A wrong bit of a Philox word moves a normal by far more than the bound on Box-Muller in float32."""
    ids = torch.tensor([0, 5, 2**31 + 3])
    key = gk.NoiseKey(0xFEDCBA9876, 3, ids, ids.flip(0), 7)
    zero = torch.zeros(3, 200_003, device="cuda")
    noise = gk.flow_step(zero, zero, (0.0, 0.0, 1.0, 0.0), key=key).x_next
    assert (noise.cpu() - gk.philox_normal((200_003,), key)).abs().max() <= NORMAL_ATOL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_density_of_the_stored_state_equals_its_replay_bit_for_bit(dtype: torch.dtype, guided: bool) -> None:
    x = torch.randn(3, 16, 5, 30, 52, device="cuda")
    velocity, other = (torch.randn_like(x).to(dtype) for _ in range(2))
    extra: dict[str, Any] = {"velocity_uncond": other, "guidance": 3.5} if guided else {}
    step = gk.flow_step(x, velocity, TABLE, key=gk.NoiseKey(1, 2, 3, torch.arange(3), 4), **extra)
    for _ in range(3):
        assert torch.equal(step.log_prob, gk.flow_log_prob(x, velocity, step.x_next.clone(), TABLE, **extra))
    one = {name: value[1:2] if isinstance(value, torch.Tensor) else value for name, value in extra.items()}
    alone = gk.flow_log_prob(x[1:2], velocity[1:2], step.x_next[1:2], TABLE, **one)
    torch.testing.assert_close(alone, step.log_prob[1:2], rtol=0, atol=1e-6)


def test_density_and_its_gradient() -> None:
    x, x_next = torch.randn(2, 5, 4001, device="cuda"), torch.randn(2, 5, 4001, device="cuda")
    velocity = torch.randn_like(x).bfloat16()
    density = lambda v: gk.flow_log_prob(x, v, x_next, TABLE)  # noqa: E731
    exact = lambda v: gk.flow_log_prob(x.double(), v, x_next.double(), TABLE)  # noqa: E731
    outputs, gradients = run_with_gradients(density, [velocity])
    with gk.use_backend("reference"):
        truth, truth_gradients = run_with_gradients(exact, [velocity.double()])
        eager, _ = run_with_gradients(density, [velocity])
    assert_matches_reference(outputs[0], truth[0], eager[0], terms=20_005)
    assert_gradients_match(gradients, truth_gradients, tolerance=2.0**-8)  # they are bfloat16


def attention_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    q, k, v = q[:, rows].double(), k.double(), v.double()
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@pytest.mark.parametrize("lengths", [(4096, 4096), (1000, 257), (515, 1030)], ids=str)
@pytest.mark.parametrize("core", [core for core in CORES if core != "reference"])
def test_attention_core(core: str, lengths: tuple[int, int]) -> None:
    """Output, LSE and gradients of one core at sampled rows; a core that is not installed must be refused by name."""
    reason = why_not(core, torch.device("cuda"), torch.bfloat16)
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda").bfloat16() for n in (lengths[0], lengths[1], lengths[1]))
    if reason:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(gk.BackendUnavailableError, match="asked for"):
            patch.setenv("GEOALIGN_ATTENTION", core)
            gk.attention(q, k, v)
        return
    outputs, gradients = run_with_gradients(lambda *t: gk.attention(*t, core=core).out, [q, k, v])
    rows = torch.randperm(lengths[0], device="cuda")[:256]
    truth = attention_rows(q, k, v, rows)
    got = outputs[0][:, rows].double()
    assert (got - truth).norm() <= 1e-2 * truth.norm(), f"{core}: output"
    lse = gk.attention(q, k, v, core=core).lse
    assert lse is not None
    exact_lse = (torch.einsum("bqhd,bkhd->bhqk", q[:, rows].double(), k.double()) * 128**-0.5).logsumexp(-1)
    # bf16 products are exact in float32; the sum of at most 4096 exponentials is not
    assert (lse[:, :, rows].double() - exact_lse).abs().max() <= 2e-3, f"{core}: LSE is not the natural logarithm"
    exact = run_with_gradients(
        lambda *t: gk.attention(*t, core="reference").out, [t.double() for t in (q, k, v)]
    )[1]  # fmt: skip
    for name, gradient, want in zip("qkv", gradients, exact, strict=True):
        assert (gradient.double() - want).norm() <= 2e-2 * want.norm(), f"{core}: gradient of {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(4096, 4096), (515, 1030)], ids=str)
def test_int8_attention(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda").to(dtype) for n in (lengths[0], lengths[1], lengths[1]))
    rows = torch.arange(0, lengths[0], 3, device="cuda")
    truth = attention_rows(q, k + 3.0, v, rows)
    got = gk.attention(q, k + 3.0, v, mode="int8").out[:, rows].double()
    assert (got - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.parametrize("lengths", [(4096, 4096), (515, 1030)], ids=str)
def test_int8_attention_with_fp8_values(lengths: tuple[int, int]) -> None:
    """Against the emulation in plain torch: both round probabilities to three bits, but relative to other maxima."""
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda").bfloat16() for n in (lengths[0], lengths[1], lengths[1]))
    if why_not_fp8(q.device):
        with pytest.raises(gk.BackendUnavailableError, match="use mode='int8'"):
            gk.attention(q, k, v, mode="int8_fp8")
        return
    rows = torch.arange(0, lengths[0], 3, device="cuda")
    truth = attention_rows(q, k + 3.0, v, rows)
    got = gk.attention(q, k + 3.0, v, mode="int8_fp8").out
    # 2.55 % of e4m3 for each of probabilities and values, 1.4 % of int8 (see test_attention.py)
    assert (got[:, rows].double() - truth).norm() <= 5e-2 * truth.norm()
    with gk.use_backend("reference"):
        emulated = gk.attention(q, k + 3.0, v, mode="int8_fp8").out
    assert (got.double() - emulated.double()).norm() <= 2**0.5 * 0.0255 * emulated.double().norm()


def test_default_core_is_exact_and_repeats_bit_for_bit() -> None:
    q, k, v = (torch.randn(1, 2048, 12, 128, device="cuda").bfloat16() for _ in range(3))
    core = gk.resolve_attention("cuda", torch.bfloat16)
    first, second = (gk.attention(q, k, v, core=core) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse), core


@pytest.fixture
def repeatable() -> Iterator[None]:
    """Torch's deterministic mode, as `run.deterministic` sets it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS's workspace is not this test's matter
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("keys", [1030, 769], ids=["self", "cross"])
@pytest.mark.parametrize("core", sorted(REPEATABLE - {"reference"}))
@pytest.mark.usefixtures("repeatable")
def test_backward_of_a_repeatable_core_repeats_over_several_key_blocks(core: str, keys: int) -> None:
    if why_not(core, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{core} is not installed")
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda").bfloat16() for n in (1030, keys, keys))
    runs = [run_with_gradients(lambda *t: gk.attention(*t, core=core).out, [q, k, v])[1] for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("repeatable")
def test_cross_attention_of_torch_repeats_where_its_other_kernels_are_off() -> None:
    """What `run.deterministic` leaves on: the flash kernel and plain products."""
    q, k, v = (torch.randn(1, 12, n, 128, device="cuda").bfloat16().requires_grad_() for n in (1030, 769, 769))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        out = [torch.nn.functional.scaled_dot_product_attention(q, k, v) for _ in range(5)]
        gradients = [torch.autograd.grad(o, (q, k, v), torch.ones_like(o)) for o in out]
    assert all(torch.equal(a, b) for run in gradients[1:] for a, b in zip(gradients[0], run, strict=True))


@pytest.mark.parametrize("mode", ["triton", "int8", "default"])
def test_attention_at_the_length_of_a_run(mode: str) -> None:
    """65,520 tokens: offsets beyond 2^31 bytes, a last block that is not full on either architecture."""
    q, k, v = (torch.randn(1, 65_520, 12, 128, device="cuda").bfloat16() for _ in range(3))
    options: dict[str, Any] = {"mode": "int8"} if mode == "int8" else {"core": None if mode == "default" else mode}
    got = gk.attention(q, k, v, **options).out
    rows = torch.cat([torch.arange(32), torch.randperm(65_520)[:32], torch.arange(65_520 - 32, 65_520)]).cuda()
    truth = torch.cat([attention_rows(*(t[:, :, h : h + 1] for t in (q, k, v)), rows) for h in range(12)], dim=2)
    assert (got[:, rows].double() - truth).norm() <= (2e-2 if mode == "int8" else 1e-2) * truth.norm()


def test_row_ops_at_the_length_of_a_run() -> None:
    """The last tokens of 65,520 equal those of a short call: offsets do not overflow."""
    tokens, tail = 65_520, 37
    q, k, v = (torch.randn(1, tokens, 12, 128, device="cuda").bfloat16() for _ in range(3))
    weight, position = torch.rand(1536, device="cuda").bfloat16(), 20.0 * torch.rand(tokens, 64, device="cuda")
    phase = torch.randn(1, tokens, 12, 42, device="cuda").bfloat16()
    whole = gk.qk_norm_rotary(q, k, v, weight, weight, position, phase_qk=phase, phase_vo=phase)
    last = gk.qk_norm_rotary(
        *(t[:, -tail:] for t in (q, k, v)), weight, weight, position[-tail:],
        phase_qk=phase[:, -tail:], phase_vo=phase[:, -tail:],
    )  # fmt: skip
    # Strides that are no multiples of 16 may compile to another contraction: an ulp of float32, one step of bfloat16.
    assert all(relative(a[:, -tail:], b) <= 2.0**-8 for a, b in zip(whole, last, strict=True))
    y, stream = q.flatten(2), torch.randn(1, tokens, 1536, device="cuda")
    vectors = [torch.randn(1, 1536, device="cuda") for _ in range(3)]
    for turn in (phase, None):
        cut = None if turn is None else turn[:, -tail:]
        whole = gk.unrotate_gate_norm(y, stream, *vectors, phase=turn, heads=12, dtype=torch.bfloat16)
        last = gk.unrotate_gate_norm(
            y[:, -tail:], stream[:, -tail:], *vectors, phase=cut, heads=12, dtype=torch.bfloat16
        )  # fmt: skip
        assert all(relative(a[:, -tail:], b) <= 2.0**-8 for a, b in zip(whole, last, strict=True))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
