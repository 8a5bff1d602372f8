"""Assertions for comparing an op with its reference: error relative to eager's own, no gradient missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches_reference(
    actual: Tensor, truth: Tensor, eager: Tensor, *, name: str = "output", factor: float = 2.0, terms: int = 1
) -> None:
    """Requires max|actual - truth| <= factor * max|eager - truth| + floor(dtype) * sqrt(terms) * max(1, max|truth|).

    Args:
        actual: result under test. truth: the same in float64. eager: the same by plain torch, dtype of ``actual``.
        name: what to call it in the message.
        factor: 2 for outputs, 3 for gradients.
        terms: number of summed terms; rounding errors of a sum grow with its square root.

    Raises:
        AssertionError: with the worst index, both errors and the bound.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    if truth.numel() == 0:
        return
    exact = truth.detach().double()
    error = (actual.detach().double() - exact).abs()
    own = (eager.detach().double() - exact).abs().max().item()
    bound = factor * own + FLOOR[actual.dtype] * terms**0.5 * max(1.0, exact.abs().max().item())
    worst = int(torch.nan_to_num(error, nan=float("inf")).argmax())
    value = error.flatten()[worst].item()
    assert value <= bound, f"{name}: |error| {value:.3e} at flat index {worst} > {bound:.3e} (eager's own {own:.3e})"


def assert_gradients_match(actual: Sequence[Tensor], truth: Sequence[Tensor], *, tolerance: float = 1e-4) -> None:
    """Requires each gradient to point and measure like the true one, and none of its rows to be missing.

    Checks relative L2 error <= tolerance, cosine >= 1 - tolerance, and that a row (first dimension) of the truth with a
    noticeable norm has at least half of it: an absolute tolerance would forgive a gradient that never arrived.

    Raises:
        AssertionError: names the gradient and the metric.
    """
    for index, (got, want) in enumerate(zip(actual, truth, strict=True)):
        g, w = got.detach().double(), want.detach().double()
        norm = w.norm().item()
        relative = (g - w).norm().item() / max(norm, 1e-30)
        assert relative <= tolerance or norm < 1e-12, f"gradient {index}: relative L2 error {relative:.3e}"
        cosine = torch.nn.functional.cosine_similarity(g.flatten(), w.flatten(), dim=0).item()
        assert cosine >= 1.0 - tolerance or norm < 1e-12, f"gradient {index}: cosine {cosine:.6f}"
        rows_got, rows_want = g.reshape(g.shape[0], -1).norm(dim=1), w.reshape(w.shape[0], -1).norm(dim=1)
        missing = (rows_want > 1e-3 * rows_want.max()) & (rows_got < 0.5 * rows_want)
        assert not missing.any(), f"gradient {index}: rows {missing.nonzero().flatten().tolist()} are missing"


def run_with_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients to ``inputs``) for fixed random output gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, leaves, weights))
