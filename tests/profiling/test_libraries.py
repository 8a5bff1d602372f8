"""Adapters of rivals call the function they name with the arguments it takes: against stand-ins of the packages."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def package(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module of that name, and of the packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        whole = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
    for key, value in functions.items():
        setattr(sys.modules[name], key, value)


@pytest.mark.usefixtures("profiling")
def test_adapters_compute_the_op_of_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_libraries as libraries

    eps = 1e-6

    def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.dim() == 2
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
        assert tensor_layout == "NHD" and not is_causal
        turned = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)

    def prefill(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert q.dim() == 3 and not causal
        return sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]

    package(monkeypatch, "flashinfer", single_prefill_with_kv_cache=prefill)
    monkeypatch.setitem(sys.modules, "flashinfer.norm", ModuleType("flashinfer.norm"))
    sys.modules["flashinfer.norm"].rmsnorm = rmsnorm  # type: ignore[attr-defined]
    package(monkeypatch, "sgl_kernel", rmsnorm=rmsnorm)
    package(monkeypatch, "sageattention", sageattn=sageattn)
    package(
        monkeypatch, "sglang.jit_kernel.diffusion.triton.scale_shift",
        fuse_scale_shift_kernel=lambda x, scale, shift: x * (1 + scale[:, None]) + shift[:, None],
    )  # fmt: skip
    x, weight = torch.randn(1, 7, 16), torch.rand(16)
    for norm in (libraries.flashinfer_rms_norm(eps), libraries.sgl_rms_norm(eps)):
        assert callable(norm)
        torch.testing.assert_close(norm(x, weight), torch.nn.functional.rms_norm(x, (16,), weight, eps))
    scale, shift = torch.randn(1, 16), torch.randn(1, 16)
    modulated = libraries.sglang_norm(eps)
    assert callable(modulated)
    expected = torch.nn.functional.layer_norm(x, (16,), eps=eps) * (1 + scale) + shift
    torch.testing.assert_close(modulated(x, scale, shift), expected)
    q, k, v = (torch.randn(1, n, 2, 8) for n in (5, 9, 9))
    import geoalign_kernels as gk

    for name in libraries.ATTENTION:
        attention = libraries.ATTENTION[name]()
        assert callable(attention)
        torch.testing.assert_close(attention(q, k, v), gk.attention(q, k, v).out)
        assert "CUDA" in libraries.attention_absent(name, torch.device("cpu"))


@pytest.mark.usefixtures("profiling")
def test_a_package_that_is_absent_or_broken_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_libraries as libraries

    assert libraries.sage_attention() == "sageattention is not installed"
    package(monkeypatch, "sageattention")  # there, but without the function
    assert "cannot be imported" in str(libraries.sage_attention())
    assert libraries.version_of("sage") is None and libraries.version_of("compiled") == torch.__version__
