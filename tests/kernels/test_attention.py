"""Attention cores on the CPU against softmax in float64, gradients, the guard of the window, the int8 error."""

from __future__ import annotations

import pytest
import torch

import geoalign_kernels as gk
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
