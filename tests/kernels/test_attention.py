"""Attention cores on the CPU against softmax in float64, gradients, the guard of the window, the int8 error."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch

import geoalign_kernels as gk
from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.ops.attention.probe import ProbedInt8Attention
from geoalign_kernels.testing import assert_gradients_match, assert_matches_reference, run_with_gradients


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("core", ["reference", "sdpa_flash"])
@pytest.mark.parametrize("lengths", [(1, 1), (37, 21)], ids=str)
def test_cores_agree_with_softmax(core: str, lengths: tuple[int, int]) -> None:
    inputs = [torch.randn(2, n, 3, 24) for n in (lengths[0], lengths[1], lengths[1])]
    exact = [t.double() for t in inputs]
    truth, truth_gradients = run_with_gradients(plain, exact)
    eager, _ = run_with_gradients(plain, inputs)
    outputs, gradients = run_with_gradients(lambda *t: gk.attention(*t, core=core).out, inputs)
    assert_matches_reference(outputs[0], truth[0], eager[0])
    if lengths[1] > 1:  # one key: softmax is constant, the true gradients of q and k are zero
        assert_gradients_match(gradients, truth_gradients, tolerance=1e-5)
    scores = torch.einsum("bqhd,bkhd->bhqk", exact[0], exact[1]) * 24**-0.5
    lse = gk.attention(*inputs, core=core).lse
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)


def test_reference_gradients_agree_with_finite_differences() -> None:
    inputs = [torch.randn(1, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5)]
    assert torch.autograd.gradcheck(lambda *t: gk.attention(*t, core="reference").out, inputs)
    args = [t.detach().float().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.geoalign.attention, (*args, 0.5, "reference"), test_utils="test_faketensor")


def test_int8_is_close_and_refused_where_it_would_bias_the_ratio() -> None:
    # A common offset of the keys is what the mean subtraction is for.
    q, k, v = torch.randn(1, 200, 2, 64), torch.randn(1, 190, 2, 64) + 4.0, torch.randn(1, 190, 2, 64)
    exact, approximate = gk.attention(q, k, v).out, gk.attention(q, k, v, mode="int8").out
    assert (exact - approximate).norm() <= 2e-2 * exact.norm()
    with gk.exact_only(), pytest.raises(RuntimeError, match="SDE window"):
        gk.attention(q, k, v, mode="int8")
    with pytest.raises(RuntimeError, match="gradient"):
        gk.attention(q.requires_grad_(), k, v, mode="int8")


def test_the_guard_of_the_window_holds_in_a_graph_compiled_outside_of_it() -> None:
    function = torch.compile(
        lambda *t: gk.attention(*t, mode="int8").out, backend="aot_eager", fullgraph=True, dynamic=False
    )
    q = torch.randn(1, 8, 1, 32)
    assert not gk.inside_exact_only()
    expected = function(q, q, q)
    with gk.exact_only():
        assert gk.inside_exact_only()
        with pytest.raises(RuntimeError, match="SDE window"):
            function(q, q, q)
    assert torch.equal(function(q, q, q), expected)


def test_fp8_values_are_as_close_as_their_three_bits_allow_and_refused_likewise() -> None:
    """e4m3 keeps three bits behind the leading one: rounding errs by 2^-4 / sqrt(3) of the binade, 2.55 % of the value
    in the root mean square. Probabilities and values err independently: 3.6 %, and 3.9 % with int8's 1.4 %."""
    q, k, v = torch.randn(1, 200, 2, 64), torch.randn(1, 700, 2, 64) + 4.0, torch.randn(1, 700, 2, 64)
    truth = plain(q.double(), k.double(), v.double())
    approximate = gk.attention(q, k, v, mode="int8_fp8").out
    assert 0.02 <= (approximate - truth).norm() / truth.norm() <= 0.05
    # A constant channel of v comes back exactly: its mean is taken off first, and the weights sum to 1.
    constant = gk.attention(q, k, torch.full_like(v, 3.7), mode="int8_fp8").out
    torch.testing.assert_close(constant, torch.full_like(q, 3.7), rtol=0, atol=1e-6)
    assert gk.attention(q, k, v, mode="int8_fp8").lse is None
    with gk.exact_only(), pytest.raises(RuntimeError, match="int8_fp8 attention inside the SDE window"):
        gk.attention(q, k, v, mode="int8_fp8")
    with pytest.raises(RuntimeError, match="gradient"):
        gk.attention(q, k, v.requires_grad_(), mode="int8_fp8")
    with pytest.raises(ValueError, match="int8_fp8"):
        gk.attention(q, k, v, mode="fp8")


def test_fp8_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from geoalign_kernels.ops.attention import fp8_support, triton_impl

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "8.0" in fp8_support.why_not_fp8(torch.device("cuda"))
    assert fp8_support.report_fp8(torch.device("cuda"))["backend"].startswith("error: ")
    q = torch.randn(1, 4, 1, 32)
    with monkeypatch.context() as patch, pytest.raises(gk.BackendUnavailableError, match="use mode='int8'"):
        patch.setattr(fp8_support, "why_not_fp8", lambda device: "no fp8")
        triton_impl.attention_int8_fp8(q, q, q, 0.25)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert fp8_support.report_fp8(torch.device("cuda"))["backend"] == "triton"


def test_heads_too_small_for_8_bit_products_are_left_to_the_reference() -> None:
    """Their tensor cores sum over 32 at least; without this a launch ends in an error of the compiler."""
    from geoalign_kernels.ops.attention import triton_impl

    q = torch.randn(1, 4, 2, 16)
    for kernel in (triton_impl.attention_int8, triton_impl.attention_int8_fp8):
        with pytest.raises(UnsupportedInput, match="got 16"):
            kernel(q, q, q, 0.25)


def test_flash_attention_2_needs_the_argument_order_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from geoalign_kernels.ops.attention import cores

    monkeypatch.setattr(cores, "_importable", lambda module: True)
    found: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in found:
            raise metadata.PackageNotFoundError
        return found[package]

    monkeypatch.setattr(cores.metadata, "version", version)
    for number, reason in (
        ("2.6.3", "it needs flash-attn >= 2.7, installed is 2.6"), ("2.7.0.post2", ""), ("2.8.3", ""), ("2.10.1", ""),
    ):  # fmt: skip
        found["flash-attn"] = number
        cores._flash2_version.cache_clear()
        assert cores.why_not("flash2", torch.device("cuda"), torch.bfloat16) == reason
    del found["flash-attn"]  # flash-attn-4 fills the name space alone
    cores._flash2_version.cache_clear()
    assert "installed is none" in cores.why_not("flash2", torch.device("cuda"), torch.bfloat16)
    cores._flash2_version.cache_clear()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "int8", "int8_fp8"])
def test_empty_sequences(mode: str, lengths: tuple[int, int]) -> None:
    q, k, v = torch.randn(1, lengths[0], 2, 16), *torch.randn(2, 1, lengths[1], 2, 16)
    assert torch.equal(gk.attention(q, k, v, mode=mode).out, torch.zeros_like(q))


@pytest.mark.parametrize("core", ["sdpa_flash", "sdpa_cudnn", "triton"])
def test_backward_of_torchs_operators_gets_no_packed_batch(core: str) -> None:
    """Torch takes any sequence offsets it is given, even empty ones, for a packed batch; on a GPU that is a crash."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from geoalign_kernels.ops.attention import cores

    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func.name(), args))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Recorder():
        grad, q, k, v, out = (torch.empty(1, n, 3, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 8, 5, 5, 8))
        dq, dk, dv = cores.backward(core, grad, q, k, v, out, torch.empty(1, 3, 8, device="cuda"), 0.125)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    ((name, args),) = [call for call in calls if "_attention_backward" in call[0]]
    schema = torch._C._get_schema(name, "")
    named = dict(zip((a.name for a in schema.arguments), args, strict=False))
    assert named["cum_seq_q"] is None and named["cum_seq_k"] is None
    assert named.get("attn_bias") is None and (named["max_q"], named["max_k"]) == (8, 5)


def test_probe_keeps_layers_exact_that_int8_would_spoil() -> None:
    probe = ProbedInt8Attention(threshold=2e-2)
    q, k, v = torch.randn(1, 300, 2, 64), torch.randn(1, 190, 2, 64), torch.randn(1, 190, 2, 64)
    spoiled = q.clone()
    spoiled[:, ::7, :, 0] *= 3000.0  # one outlier channel sets the scale: every other channel rounds to zero
    assert torch.equal(probe(0, q, k, v), gk.attention(q, k, v, mode="int8").out)
    assert torch.equal(probe(1, spoiled, k, v), gk.attention(spoiled, k, v).out)
    broken = torch.full_like(q, float("nan"))
    probe(2, broken, k, v)
    assert [probe.is_exact(layer) for layer in range(3)] == [False, True, True]
    # the sampled error is the error of those blocks in the full call: 300 queries are blocks 0, 1 (and a partial 2)
    rows = slice(0, 256)
    exact, approximate = (gk.attention(q, k, v, mode=mode).out[:, rows] for mode in ("exact", "int8"))
    assert probe.errors[0] == pytest.approx(((approximate - exact).norm() / exact.norm()).item(), rel=1e-3)
    with gk.exact_only(), pytest.raises(RuntimeError, match="SDE window"):
        probe(0, q, k, v)


def test_probe_lets_the_worst_of_early_middle_and_late_steps_count() -> None:
    q, k, v = torch.randn(1, 300, 2, 64), torch.randn(1, 190, 2, 64), torch.randn(1, 190, 2, 64)
    spoiled = q.clone()
    spoiled[:, ::7, :, 0] *= 3000.0
    probe = ProbedInt8Attention(threshold=2e-2)
    for noise, inputs, measures, expected, complete in (
        (1.0, q, True, "int8", False), (0.9, spoiled, False, "int8", False),  # a second early step is not measured
        (0.5, q, True, "int8", False), (0.1, spoiled, True, "exact", True), (0.0, q, False, "exact", True),
        (1.0, q, False, "exact", True),
    ):  # fmt: skip
        probe.at(noise)
        assert probe.saw_all_stages == complete
        assert probe.measures(0) == measures
        assert torch.equal(probe(0, inputs, k, v), gk.attention(inputs, k, v, mode=expected).out)
    probe.at(1.0)
    assert probe.measures(1)
    probe.settle(["exact", "int8"])
    assert not probe.measures(1) and torch.equal(probe(1, spoiled, k, v), gk.attention(spoiled, k, v, mode="int8").out)


def test_probe_takes_the_first_mode_that_a_layer_tolerates() -> None:
    q, k, v = torch.randn(1, 300, 2, 64), torch.randn(1, 190, 2, 64), torch.randn(1, 190, 2, 64)
    spoiled = q.clone()
    spoiled[:, ::7, :, 0] *= 3000.0
    modes = ("int8_fp8", "int8")
    careful, bold = ProbedInt8Attention(2e-2, modes=modes), ProbedInt8Attention(6e-2, modes=modes)
    for probe in (careful, bold):
        probe(0, q, k, v)
        probe(1, spoiled, k, v)
        # values that hardly vary: fp8 rounds what is left beside the mean
        probe(2, q, k, 5.0 + 0.1 * v)
    assert careful.chosen == {0: "int8", 1: "exact", 2: "int8_fp8"}
    assert bold.chosen == {0: "int8_fp8", 1: "exact", 2: "int8_fp8"}
    assert torch.equal(careful(0, q, k, v), gk.attention(q, k, v, mode="int8").out)
    assert careful.errors[0] <= 2e-2 < bold.errors[0] <= 6e-2
    with pytest.raises(ValueError, match="int8_fp8"):
        ProbedInt8Attention(modes=("fp8",))


def test_core_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gk.resolve_attention("cpu", torch.float32) == "sdpa_flash"
    with gk.use_backend("reference"):
        assert gk.resolve_attention("cpu", torch.float32) == "reference"
    monkeypatch.setenv("GEOALIGN_ATTENTION", "flash2")
    with pytest.raises(gk.BackendUnavailableError, match="CUDA"):
        gk.resolve_attention("cpu", torch.bfloat16)
    monkeypatch.setenv("GEOALIGN_ATTENTION", "xformers")
    with pytest.raises(ValueError, match="sdpa_flash"):
        gk.resolve_attention("cpu", torch.bfloat16)


def test_checkpoint_policy_sees_the_op() -> None:
    """A policy that must save attention makes a recompute skip it: one forward call, not two."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    op, seen = torch.ops.geoalign.attention.default, []

    def policy(ctx: object, func: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        seen.append(func)
        return CheckpointPolicy.MUST_SAVE if func == op else CheckpointPolicy.PREFER_RECOMPUTE

    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = checkpoint(
        lambda t: gk.attention(t, t, t).out.sin(), q, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    out.sum().backward()
    direct = q.detach().clone().requires_grad_()
    gk.attention(direct, direct, direct).out.sin().sum().backward()
    assert op in seen and torch.equal(q.grad, direct.grad)


def test_blocks_of_threads_that_overlap_end_with_the_last() -> None:
    """Ranks simulated by threads once left the guard closed: each restored what it had found."""
    first, second = gk.exact_only(), gk.exact_only()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gk.inside_exact_only()
    second.__exit__(None, None, None)
    assert not gk.inside_exact_only()
