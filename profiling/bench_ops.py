"""Microbenchmarks of the kernels: ceilings first and last, medians with p20/p80, rotating buffers, one JSON line a row.

    python profiling/bench_ops.py [--out FILE.jsonl] [--tokens 65520]      on a CUDA device
    python profiling/bench_ops.py --self-check                             on any machine, tiny sizes, no timings kept

Each op runs as `ours` (what `auto` resolves to) and as `eager` (the plain torch reference); both are compared in the
same run. A run whose copy ceiling moved by more than 3 % is marked unsteady.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import geoalign_kernels as gk

HEADS, HEAD, PAIRS = 12, 128, 42
BUFFERS = 3  # a [65520, 1536] bf16 operand is 201 MB, so three rotated sets exceed every L2 cache


def measure(call: Callable[[int], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of `call(buffer index)`: median, p20 and p80 after ten warm-ups."""
    for i in range(min(10, repeats)):
        call(i % BUFFERS)
    times = []
    for i in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call(i % BUFFERS)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call(i % BUFFERS)
            times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=10)
    return {"t_ms_median": statistics.median(times), "t_ms_p20": cuts[1], "t_ms_p80": cuts[7], "n_rep": repeats}


def cases(tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[int], Any], int]]:
    """`{op: (call on a buffer set, bytes that must move)}` on random data."""
    width = HEADS * HEAD

    def rand(*shape: int, kind: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device).to(kind) for _ in range(BUFFERS)]

    q, k, v = (rand(1, tokens, HEADS, HEAD) for _ in range(3))
    x, y = rand(1, tokens, width), rand(1, tokens, width)
    phase = rand(1, tokens, HEADS, PAIRS, kind=torch.float32)
    vectors = [torch.randn(1, width, device=device) for _ in range(3)]
    weight, position = torch.rand(width, device=device).to(dtype), torch.rand(tokens, HEAD // 2, device=device)
    state = rand(1, tokens * 32, kind=torch.float32)  # latent elements: tokens / 2 target tokens x 64 values
    row, angles = tokens * width * x[0].element_size(), phase[0].numel() * 4
    table, key = (0.98, -0.04, 0.3, 0.0), gk.NoiseKey(0, 0, 0, 0, 0)
    return {
        "qk_norm_rotary": (
            lambda i: gk.qk_norm_rotary(
                q[i], k[i], v[i], weight, weight, position, phase_qk=phase[i], phase_vo=phase[i]
            ),
            6 * row + 2 * angles,
        ),
        "unrotate_gate_norm": (
            lambda i: gk.unrotate_gate_norm(y[i], x[i], *vectors, phase=phase[i], heads=HEADS),
            4 * row + angles,
        ),
        "modulated_norm": (lambda i: gk.modulated_norm(x[i], *vectors[:2]), 2 * row),
        "gated_residual": (lambda i: gk.gated_residual(x[i], y[i], vectors[0]), 3 * row),
        "flow_step": (lambda i: gk.flow_step(state[i], state[i - 1], table, key=key), 6 * 4 * state[0].numel()),
    }


def copy_ceiling(device: torch.device, size: int, repeats: int) -> dict[str, Any]:
    """Bandwidth of a device copy, read and write counted."""
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    row = measure(lambda _: target.copy_(source), device, repeats)
    return {"kind": "ceiling", "name": "copy", **row, "gbps": 8e-6 * size / row["t_ms_median"]}


def relative_error(a: Any, b: Any) -> float:
    """Largest relative L2 distance between the tensors of two results."""
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return max(((p.double() - q.double()).norm() / q.double().norm().clamp_min(1e-30)).item() for p, q in pairs)


def run(tokens: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """All rows of one run."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    environment = {"kind": "environment", "device": name, "torch": torch.__version__, "tokens": tokens}
    size = 1 << (30 if cuda else 16)
    first = copy_ceiling(device, size, repeats)
    rows = [environment, first]
    for op, (call, bytes_min) in cases(tokens, device, torch.bfloat16 if cuda else torch.float32).items():
        with gk.use_backend("reference"):
            expected, eager = call(0), measure(call, device, repeats)
        error, ours = relative_error(call(0), expected), measure(call, device, repeats)
        for variant, row in (("eager", eager), ("ours", ours)):
            gbps = 1e-6 * bytes_min / row["t_ms_median"]
            rows.append({"kind": "kernel", "name": op, "variant": variant, **row, "bytes_min": bytes_min,
                         "gbps": gbps, "pct_copy": 100.0 * gbps / first["gbps"], "rel_l2": error})  # fmt: skip
    last = copy_ceiling(device, size, repeats)
    return [*rows, last | {"steady": abs(last["gbps"] / first["gbps"] - 1.0) <= 0.03}]


def main() -> int:
    """Entry point: 0 if every op agrees with its reference, 1 otherwise, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--tokens", type=int, default=65_520)
    parser.add_argument("--self-check", action="store_true", help="tiny sizes on the CPU: exercises the harness only")
    options = parser.parse_args()
    if not options.self_check and not torch.cuda.is_available():
        print("no CUDA device: use --self-check", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.self_check else "cuda")
    with torch.no_grad():
        rows = run(8 if options.self_check else options.tokens, device, 5 if options.self_check else 30)
    for row in rows:
        print(json.dumps(row))
    if options.out and not options.self_check:
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0 if all(row.get("rel_l2", 0.0) <= 1e-2 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
