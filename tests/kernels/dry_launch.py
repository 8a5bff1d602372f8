"""Compiles what real launches at the edges of the kernels' domain would run, without a GPU.

    python tests/kernels/dry_launch.py 90        a JSON line per case: its name, what failed, and its launches

The launchers specialise on values as Triton does at a launch: an argument that is 1 becomes a constant, one divisible
by 16 is known to be. The production types of `geoalign_kernels.static` do not show these. Only the launch itself is
left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from kernel_cases import NAMES, op_cases
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import geoalign_kernels as gk
from geoalign_kernels import dispatch
from geoalign_kernels.ops.attention import fp8_support, triton_impl
from geoalign_kernels.testing import run_with_gradients

ONE_TOKEN, ONE_QUERY = (1, 1, 2, 16, 4), (1, 3, 1, 16, 5)  # batch, tokens, heads, head size, phases; two queries fewer
Case = tuple[str, Callable[[], Any]]


class Driver:
    """Stands for Triton's driver of one GPU, as far as a launch asks before it launches."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def row_cases() -> Iterator[Case]:
    """Every row op forward and backward on one token, on one query, and on rows whose strides are odd."""
    for label, shape in (("one token", ONE_TOKEN), ("one query", ONE_QUERY)):
        for name in NAMES:
            function, inputs = op_cases(torch.bfloat16, *shape)[name]
            yield f"{name}, {label}", lambda function=function, inputs=inputs: run_with_gradients(function, inputs)
    x, y = (torch.randn(2, 3, 33).bfloat16()[..., :32] for _ in range(2))  # row stride 33, and the same as a gradient
    vector, heads = torch.randn(2, 33)[:, :32], x.unflatten(2, (2, 16))
    phase = torch.randn(2, 3, 2, 5)[..., :4]
    yield (
        "qk_norm_rotary, odd strides",
        lambda: gk.qk_norm_rotary(heads, heads, heads, vector[0], vector[0], None, phase_qk=phase, phase_vo=phase),
    )
    yield (
        "unrotate_gate_norm, odd strides",
        lambda: gk.unrotate_gate_norm(y, x, vector, vector, vector, phase=phase, heads=2),
    )
    yield "rms_norm, odd strides", lambda: torch.ops.geoalign.rms_norm_backward(y, x, vector[0], 1e-6, [True, True])
    yield "modulated_norm, odd strides", lambda: torch.ops.geoalign.modulated_norm_backward(y, x, vector, 1e-6)


def flow_cases() -> Iterator[Case]:
    """One element of one sample: every count is 1."""
    x, key = torch.zeros(1, 1), gk.NoiseKey(1, 1, torch.zeros(1, dtype=torch.int64), torch.zeros(1).long(), 1)
    table = (0.98, -0.04, 0.3, 0.0)
    yield "flow_step, one element", lambda: gk.flow_step(x, x, table, key=key)
    yield "flow_log_prob, one element", lambda: run_with_gradients(lambda v: gk.flow_log_prob(x, v, x, table), [x])


def attention_cases(target: int) -> Iterator[Case]:
    """The smallest heads, one token of one head, odd strides, and float32 at the largest head."""

    def operands(tokens: int, heads: int, head: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(1, tokens, heads, head).to(dtype) for _ in range(3)]

    small, wide = operands(1, 1, 16, torch.bfloat16), operands(5, 3, 128, torch.float32)
    odd = [torch.randn(1, 5, 65).bfloat16()[..., :64].unflatten(2, (2, 32)) for _ in range(3)]
    yield "attention, head of 16", lambda: triton_impl.forward(*small, 0.25)
    for mode in ("int8", "int8_fp8") if target == 90 else ("int8",):
        kernel = getattr(triton_impl, f"attention_{mode}")
        yield f"{mode}, head of 32, odd strides", lambda kernel=kernel: kernel(*odd, 0.25)
        yield f"{mode}, float32, head of 128", lambda kernel=kernel: kernel(*wide, 0.25)


def attempts(target: int) -> Iterator[dict[str, Any]]:
    """Runs the cases up to their launches: name, error (empty if none), and [kernel, shared bytes] of each launch."""
    launches: list[tuple[str, int]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.fn.__name__, compiled.metadata.shared))
        return compiled

    tiles = triton_impl.TILES
    triton.runtime.driver.set_active(Driver(target))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(dispatch, "_why_not", lambda *_: ""),
        mock.patch.object(triton_impl, "tile", lambda _, fp8: triton_impl.FP8_TILE if fp8 else tiles[target]),
        mock.patch.object(fp8_support, "why_not_fp8", lambda _: ""),
        gk.use_backend("triton"),
    ):
        for name, case in (*row_cases(), *flow_cases(), *attention_cases(target)):
            error = ""
            try:
                case()
            except Exception as found:
                error = f"{type(found).__name__}: {found}"
            yield {"case": name, "error": error, "launches": launches.copy()}
            launches.clear()


if __name__ == "__main__":
    for attempt in attempts(int(sys.argv[1])):
        print(json.dumps(attempt), flush=True)
