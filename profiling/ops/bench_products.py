"""Matrix products with their epilogues, in three number formats.

The plain bfloat16 product with its bias is the row to divide by: the GELU, the formats and their quantisation of the
activations are quoted as its multiples. Weights are quantised once, outside the time, as a server would.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import bench_rivals as rivals
import torch
from bench_cases import Case, Deferred, Work, sets
from bench_timing import installed
from torch import Tensor, nn
from torch.nn import functional

Implementation = rivals.Implementation
FFN = (65_520, 1536, 8960)  # rows, in, out
FP8_MAX = 448.0
EXACT = ("torch", "compiled", "cublaslt")
"""Products of bfloat16 operands whose error is gated."""


def gelu(x: Tensor) -> Tensor:
    """The feed-forward's activation."""
    return functional.gelu(x, approximate="tanh")


def product_cases(rows: int, inner: int, outer: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """x W^T + b with and without GELU, in the given dtype, int8 and fp8."""
    weight = torch.randn(outer, inner, device=device).mul_(inner**-0.5).to(dtype)
    bias = torch.randn(outer, device=device).to(dtype)
    operands = sets(lambda: (torch.randn(rows, inner, device=device).to(dtype),), device)
    size, wide = dtype.itemsize, {"int8": 1, "fp8": 1}
    int8, fp8 = _int8_weight(weight), _fp8_weight(weight)

    def case(
        variant: str, implementations: dict[str, Implementation | Deferred | str], truth: Implementation, **more: object
    ) -> Case:
        width = wide.get(variant.partition(" ")[0], size)
        work = Work(
            float(rows * inner * size + inner * outer * width + rows * outer * size), 2.0 * rows * inner * outer
        )
        return Case(
            "ffn_product", variant, (rows, inner, outer), operands, implementations, truth, {"fwd": work}, (0,),
            output_dim=0, gated=frozenset(EXACT if variant in ("plain", "gelu") else ()), **more,
        )  # fmt: skip

    wide_weight, wide_bias = weight.double(), bias.double()
    plain = lambda x: functional.linear(x, wide_weight, wide_bias)  # noqa: E731
    yield case("plain", {"torch": lambda x: functional.linear(x, weight, bias)}, plain, rates={"torch": "matmul"})
    activated = lambda x: gelu(functional.linear(x, weight, bias))  # noqa: E731
    yield case(
        "gelu",
        {
            "eager": activated,
            "compiled": rivals.compiled(activated, device),
            "cublaslt": lambda x: torch._addmm_activation(bias, x, weight.T, use_gelu=True),
        },
        lambda x: gelu(plain(x)), rates=dict.fromkeys(("eager", "compiled", "cublaslt"), "matmul"),
    )  # fmt: skip
    yield case(
        "int8",
        {
            "torch": int8(bias),
            "compiled": rivals.compiled(int8(bias), device),
            "torchao": _torchao(weight, bias, device),
        },
        plain, rates=dict.fromkeys(("torch", "compiled", "torchao"), "matmul_int8"),
    )  # fmt: skip
    absent = why_not_fp8_product(device)
    made = {"torch": fp8(bias), "compiled": rivals.compiled(fp8(bias), device)}
    yield case("fp8", dict.fromkeys(made, absent) if absent else made, plain)


def why_not_fp8_product(device: torch.device) -> str:
    """Why `torch._scaled_mm` does not run here; empty if it does."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"fp8 products need compute capability 8.9, this device has {major}.{minor}"


def _int8_weight(weight: Tensor) -> Callable[[Tensor], Implementation]:
    """W8A8: int8 per row of the activations, per output channel of the weight."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127.0
    stored = (weight.float() / scale).round().to(torch.int8)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        by_row = x.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127.0
        quantised = (x.float() / by_row).round().to(torch.int8)
        return (torch._int_mm(quantised, stored.T).float() * (by_row * scale.T) + bias.float()).to(x.dtype)

    return lambda bias: functools.partial(product, bias=bias)


def _fp8_weight(weight: Tensor) -> Callable[[Tensor], Implementation]:
    """e4m3 with one scale for the activations and one for the weight."""
    scale = weight.float().abs().amax() / FP8_MAX
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        by_tensor = x.float().abs().amax().clamp_min(1e-8) / FP8_MAX
        quantised = (x.float() / by_tensor).to(torch.float8_e4m3fn)
        return torch._scaled_mm(quantised, stored.T, by_tensor, scale, bias, out_dtype=x.dtype)

    return lambda bias: functools.partial(product, bias=bias)


def _torchao(weight: Tensor, bias: Tensor, device: torch.device) -> Deferred | str:
    """torchao's dynamic W8A8 linear under `torch.compile`."""
    if not installed("torchao"):
        return "torchao is not installed"

    def make() -> Implementation:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device=device, dtype=weight.dtype).requires_grad_(False)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        quantisation = importlib.import_module("torchao.quantization")
        quantisation.quantize_(layer, quantisation.Int8DynamicActivationInt8WeightConfig())
        return rivals.compiled(layer, device)

    return Deferred(make)
