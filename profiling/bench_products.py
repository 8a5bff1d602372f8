"""Matrix products with their epilogues, in three number formats, and reward blocks with random weights.

The plain bfloat16 product with its bias is the row to divide by: the GELU, the formats and their quantisation of the
activations are quoted as its multiples. Weights are quantised once, outside the time, as a server would.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import bench_rivals as rivals
import torch
from bench_cases import Case, Deferred, Work, sets
from bench_timing import installed
from torch import Tensor, nn
from torch.nn import functional

from geoalign.rewards.mapanything.blocks import Block
from geoalign.rewards.vlm.body import TextModel, VisionTower, text_table, vision_table
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout

Implementation = rivals.Implementation
FFN = (65_520, 1536, 8960)  # rows, in, out
FP8_MAX = 448.0


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
            output_dim=0, gated=frozenset({"torch", "compiled"} if variant in ("plain", "gelu") else ()), **more,
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
    yield case("fp8", {"torch": fp8(bias), "compiled": rivals.compiled(fp8(bias), device)}, plain)


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


def block_cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """One block of every reward transformer at the sizes of a scored video; the weights are random."""
    big, little = HPSV3_BODY, VIDEOALIGN_BODY
    frames, grid, views, length, long = 81, (24, 42), 21 * 37, 506, 1780
    width, heads = 1536, 24
    if small:
        big = little = QwenLayout(32, 1, 2, 64, 48, 1, 4, 2, 64, rows=1)
        frames, grid, views, length, long, width, heads = 2, (4, 4), 6, 10, 12, 24, 2
    yield _text_case("qwen2-vl-7b text, all frames", big, frames, length, device, dtype)
    yield _text_case("qwen2-vl-7b text, one frame", big, 1, length, device, dtype)
    yield _text_case("qwen2-vl-2b text", little, 1, long, device, dtype)
    yield _vision_case("qwen2-vl vision", big, frames, grid, device, dtype)
    hidden = (4 * width * 2 // 3 + 7) // 8 * 8  # of the gated feed-forward
    weights = 4 * width * width + 3 * width * hidden
    for variant, shape in (
        ("vit-g, frame by frame", (frames, views, width)), ("multi-view, all frames", (1, frames * views, width)),
    ):  # fmt: skip
        make = lambda: _Streamed(Block(width, heads, "swiglu", layer_scale=True))  # noqa: E731
        yield _block_case(variant, make, shape, weights, 1.0, device, dtype)


class _Streamed(nn.Module):
    """A block whose residual stream, norms and layer scales are float32, on inputs in the dtype of the case."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


class _Tabled(nn.Module):
    """A block with its rotary tables: in the dtype of the input (text) or in float32 (vision), as in the models."""

    def __init__(self, block: nn.Module, tables: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.block, self.tables, self.dtype = block, tables, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, *(table.to(x.device, self.dtype or x.dtype) for table in self.tables))


def _text_case(
    variant: str, layout: QwenLayout, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> Case:
    layout = dataclasses.replace(layout, depth=1, rows=1)
    d, share = layout.width, layout.kv_heads / layout.heads
    weights = 2 * d * d + 2 * share * d * d + 3 * d * layout.hidden
    make = lambda: _Tabled(TextModel(layout).layers[0], text_table(length, layout), None)  # noqa: E731
    return _block_case(variant, make, (batch, length, d), weights, 0.5, device, dtype)  # causal: half of the scores


def _vision_case(
    variant: str, layout: QwenLayout, frames: int, grid: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Case:
    layout, d = dataclasses.replace(layout, vision_depth=1), layout.vision_width
    weights = 4 * d * d + 2 * d * layout.vision_hidden
    make = lambda: _Tabled(VisionTower(layout).blocks[0], vision_table(grid, layout), torch.float32)  # noqa: E731
    return _block_case(variant, make, (frames, grid[0] * grid[1], d), weights, 1.0, device, dtype)


def _block_case(
    variant: str, make: Callable[[], nn.Module], shape: tuple[int, int, int], weights: float, share: float,
    device: torch.device, dtype: torch.dtype,
) -> Case:  # fmt: skip
    """Case of the block that `make` builds, of `weights` matrix entries and `share` of all scores."""
    wide = torch.float32 if device.type == "cuda" else torch.float64

    @functools.cache
    def stored() -> nn.Module:
        block = make().to(device).requires_grad_(False)
        for module in block.modules():
            if isinstance(module, nn.Linear) or not isinstance(block, _Streamed):
                module.to(dtype)
        return block

    @functools.cache
    def exact() -> nn.Module:
        return copy.deepcopy(stored()).to(wide)

    batch, length, width = shape
    flops = 2.0 * weights * batch * length + share * 4.0 * batch * length**2 * width
    moved = dtype.itemsize * (2.0 * batch * length * width + weights)
    implementations = {
        "eager": Deferred(stored),
        "compiled": Deferred(lambda: rivals.compiled(stored(), device)),
        "graph": Deferred(stored),
    }
    return Case(
        "reward_block", variant, shape, sets(lambda: (torch.randn(shape, device=device).to(dtype),), device),
        implementations, lambda x: exact()(x), {"fwd": Work(moved, flops)}, (None,),
        rates=dict.fromkeys(implementations, "reward"), gated=frozenset(), graphed=frozenset({"graph"}),
        truth_dtype=wide,
    )  # fmt: skip
