"""Microbenchmarks of the kernels against their rivals, as fractions of ceilings measured in the same process.

    python profiling/bench_ops.py [--quick] [--only NAME] [--out FILE.jsonl]     on a CUDA device
    python profiling/bench_ops.py --self-check [--out FILE.jsonl]                on any machine, tiny sizes

Ceilings (device copy, matrix products) come first and last: if one moved by more than 3 % the run is unsteady and not
to be quoted. Inputs are random; three sets are used in turn. Every row carries the error of that implementation
against float64 on sampled rows, taken in the same run. A rival that is absent has a row with `status` "not run".
`predicted_ms` is what the cost model said before the run. Exit code: 0, or 1 if an exact row misses its error gate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_attention as attention
import bench_cases as cases
import torch
from bench_timing import BUFFERS, SCHEMA, clocks, count_launches, environment, errors, git, measure, poison
from torch import Tensor

from geoalign.perf.cost import DEVICES, DeviceProfile, TransformerCost
from geoalign_kernels.static_check import EXPECTATIONS

GATE = 1e-2
"""Largest relative L2 error of an exact bf16 row; int8 rows are reported, not gated."""
STEADY = 0.03
GEMMS = ((65_520, 1536, 1536), (65_520, 1536, 4608), (65_520, 1536, 8960), (65_520, 8960, 1536))  # rows, in, out
RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


class Bench:
    """One run: the device, how often to repeat, the ceilings found so far, the rows."""

    def __init__(self, device: torch.device, *, quick: bool, small: bool) -> None:
        self.device, self.small, self.quick = device, small, quick
        self.repeats = 5 if small else 30
        self.dtype = torch.float32 if small else torch.bfloat16
        self.run_id = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        self.rows: list[Row] = [environment(device, self.run_id)]
        self.ceiling: dict[str, float] = {}
        profile = {(9, 0): "h200", (8, 0): "a800"}
        found = profile.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
        self.profile: DeviceProfile | None = DEVICES[found] if found else None
        self.static = json.loads(EXPECTATIONS.read_text())["rows"]

    def add(self, kind: str, name: str, impl: str, **fields: Any) -> Row:
        """Appends a row and prints it."""
        row = {"schema": SCHEMA, "run_id": self.run_id, "kind": kind, "name": name, "impl": impl, "status": "ok"}
        row |= {"dtype": str(self.dtype).removeprefix("torch."), **fields}
        time_ms = row.get("t_ms_median")
        if time_ms and row.get("bytes_min"):
            row["gbps"] = 1e-6 * row["bytes_min"] / time_ms
            row["pct_copy"] = 100.0 * row["gbps"] / self.ceiling["copy"] if "copy" in self.ceiling else None
        if time_ms and row.get("flops"):
            row["tflops"] = 1e-9 * row["flops"] / time_ms
            row["pct_matmul"] = 100.0 * row["tflops"] / self.ceiling["matmul"] if "matmul" in self.ceiling else None
        self.rows.append(row)
        shown = f"{time_ms:10.4f} ms" if time_ms else f"{row['status']}: {row.get('note', '')}"
        print(f"{name:20s} {row.get('direction', ''):4s} {impl:12s} {row.get('shape', '')!s:28s} {shown}", flush=True)
        return row

    def not_run(self, name: str, impl: str, direction: str, shape: Any, reason: str) -> None:
        """A row for what was not timed, so that its absence is visible."""
        self.add("kernel", name, impl, direction=direction, shape=list(shape), status="not run", note=reason)

    def ceilings(self, when: str) -> None:
        """Copy (read and write counted) and matrix products; the later call marks the run steady or not."""
        size = 1 << (14 if self.small else 30)  # 4 GiB read and 4 GiB written
        source, target = torch.randn(size, device=self.device), torch.empty(size, device=self.device)
        copy = measure(lambda _, to=target, source=source: to.copy_(source), self.device, self.repeats)
        found = {"copy": self.add("ceiling", "copy", when, shape=[size], bytes_min=8.0 * size, **copy)["gbps"]}
        del source, target
        side = 64 if self.small else 8192
        for m, k, n in [(side, side, side), *(GEMMS if not self.small else [(side, 32, 96)])]:
            a, b = (torch.randn(shape, device=self.device).to(self.dtype) for shape in ((m, k), (k, n)))
            flops = 2.0 * m * k * n
            predicted = 1e3 * flops / self.profile.matmul if self.profile else None
            time = measure(lambda _, a=a, b=b: a @ b, self.device, self.repeats)
            row = self.add("ceiling", "matmul", when, shape=[m, k, n], flops=flops, predicted_ms=predicted, **time)
            found.setdefault("matmul", row["tflops"])
        if self.ceiling:
            moved = {name: found[name] / self.ceiling[name] - 1.0 for name in found}
            steady = all(abs(change) <= STEADY for change in moved.values())
            self.add("steadiness", "ceilings", when, steady=steady, moved=moved, clocks_after=clocks(self.device))
        self.ceiling = self.ceiling or found

    def static_numbers(self, name: str, direction: str, impl: str) -> Row:
        """Registers, spills and shared memory of our kernels for this architecture, from the checked-in table."""
        if self.device.type != "cuda" or impl not in ("ours", "triton", "int8"):
            return {}
        major, minor = torch.cuda.get_device_capability(self.device)
        wanted = re.compile(rf"{name}\..*" + ("backward" if direction == "bwd" else ""))
        keys = [k for k in self.static if wanted.match(k) and k.endswith(f"sm_{major}{minor}")]
        keys = [k for k in keys if ("backward" in k) == (direction == "bwd")]
        fields = (("regs", "registers"), ("spill_bytes", "spill_bytes"), ("smem_bytes", "shared_bytes"))
        return {new: max(self.static[k][old] for k in keys) for new, old in fields} if keys else {}

    def time(self, name: str, impl: str, direction: str, call: Any, check: Row, **fields: Any) -> None:
        """One timed row; running out of memory is a row as well."""
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            timing = measure(call, self.device, self.repeats)
            fields["launches"] = count_launches(call, self.device)
            fields["peak_mem_bytes"] = (
                torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            )
        except torch.OutOfMemoryError as error:
            self.not_run(name, impl, direction, fields["shape"], f"out of memory: {str(error).splitlines()[0]}")
            return
        static = self.static_numbers(name, direction, impl)
        self.add("kernel", name, impl, direction=direction, **fields, **static, **timing, **check)

    def streaming(self, case: cases.Case) -> None:
        """Forward and backward rows of every implementation of a streaming op."""
        rows = torch.randperm(case.shape[0], device=self.device)[: cases.SAMPLED]
        for impl, function in case.implementations.items():
            for direction in case.bytes_min:
                if isinstance(function, str):
                    self.not_run(case.name, impl, direction, case.shape, function)
                    continue
                traffic, bytes_min = case.prediction.get(impl), case.bytes_min[direction]
                # A published backward has no figure: only forward traffic was counted for the eager code.
                known = self.profile and traffic and (impl != "eager" or direction == "fwd")
                predicted = 1e3 * traffic * bytes_min / self.profile.bandwidth if known else None
                self.guarded(case, impl, direction, rows, shape=list(case.shape), bytes_min=bytes_min,
                             predicted_ms=predicted)  # fmt: skip

    def guarded(self, case: cases.Case, impl: str, direction: str, rows: Tensor, **fields: Any) -> None:
        """Checks and times one implementation; a rival that fails to compile or run is a "not run" row."""
        try:
            call, check = prepare(case, impl, direction, rows, self.device)
        except Exception as error:
            if impl == "ours":
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.not_run(case.name, impl, direction, case.shape, reason)
            return
        self.time(case.name, impl, direction, call, check, **fields)

    def attention(self, case: attention.AttentionCase, backward: bool) -> None:
        """Rows of every core at one pair of lengths."""
        q, k, v = case.operands[0]
        rows, columns = (torch.randperm(n, device=self.device)[: cases.SAMPLED] for n in (case.queries, case.keys))
        exact, grad = attention.exact_rows(q, k, v, rows), torch.randn_like(q)
        gradients = attention.exact_gradients(q, k, v, grad, rows, columns) if backward else None
        name = "attention" if case.queries == case.keys else "cross_attention"
        for impl, reason in attention.implementations(self.device, self.dtype, case.queries).items():
            for direction in ("fwd", "bwd") if backward and impl != "int8" else ("fwd",):
                fields = {"shape": list(case.shape), "flops": case.forward_flops, "bytes_min": case.bytes_min}
                rates = {"fwd": "attention_int8" if impl == "int8" else "attention", "bwd": "attention_backward"}
                if direction == "bwd":
                    fields |= {"flops": 2.5 * case.forward_flops, "bytes_min": 2.0 * case.bytes_min}
                if self.profile and name == "attention":
                    fields["predicted_ms"] = 1e3 * fields["flops"] / getattr(self.profile, rates[direction])
                try:
                    if reason:
                        raise RuntimeError(reason)
                    call, check = prepare_attention(case, impl, direction, grad, rows, columns, exact, gradients)
                except Exception as error:
                    self.not_run(name, impl, direction, case.shape, str(error).partition("\n")[0])
                    continue
                self.time(name, impl, direction, call, check, **fields)


def prepare(
    case: cases.Case, impl: str, direction: str, rows: Tensor, device: torch.device
) -> tuple[Any, dict[str, float | None]]:
    """(call to time, errors against float64) of one implementation of a streaming op."""
    function, leaves = case.implementations[impl], [list(buffer) for buffer in case.operands]
    by_token = [i for i in case.differentiable if case.token_dims[i] is not None] or list(case.differentiable)
    exact_inputs = case.sampled(rows)
    pick = (lambda t: t.index_select(1, rows)) if any(dim is not None for dim in case.token_dims) else lambda t: t
    poison(device, case.operands[0][0].numel())
    if direction == "fwd":
        with torch.no_grad():
            check = {"rel_l2": None, "max_abs": None}
            outputs = _leaves(function(*leaves[0]))
            if impl not in case.unchecked:
                check = errors([pick(o) for o in outputs], _leaves(case.truth(*exact_inputs)))

        def call(i: int) -> Any:
            with torch.no_grad():
                return function(*leaves[i])

        return call, check
    for buffer in leaves:
        for i in case.differentiable:
            buffer[i] = buffer[i].detach().requires_grad_()
    results = [_leaves(function(*buffer)) for buffer in leaves]
    weights = [torch.randn_like(o) for o in results[0]]
    for i in by_token:
        exact_inputs[i].requires_grad_()
    truth = torch.autograd.grad(
        _leaves(case.truth(*exact_inputs)), [exact_inputs[i] for i in by_token], [pick(w).double() for w in weights]
    )

    def backward(i: int) -> Any:
        wanted = [leaves[i][j] for j in case.differentiable]
        return torch.autograd.grad(results[i], wanted, weights, retain_graph=True)

    got = dict(zip(case.differentiable, backward(0), strict=True))
    return backward, errors([pick(got[i]) for i in by_token], list(truth))


def _leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def prepare_attention(
    case: attention.AttentionCase, impl: str, direction: str, grad: Tensor, rows: Tensor, columns: Tensor,
    exact: Tensor, gradients: tuple[Tensor, ...] | None,
) -> tuple[Any, dict[str, float]]:  # fmt: skip
    """(call to time, errors against float64) of one attention core."""
    poison(grad.device, grad.numel())
    if direction == "fwd":

        def call(i: int) -> Tensor:
            with torch.no_grad():
                return attention.forward(impl, *case.operands[i])

        return call, errors(call(0)[:, rows], exact)
    leaves = [tuple(t.detach().requires_grad_() for t in buffer) for buffer in case.operands]
    results = [attention.forward(impl, *buffer) for buffer in leaves]

    def backward(i: int) -> Any:
        return torch.autograd.grad(results[i], leaves[i], grad, retain_graph=True)

    dq, dk, dv = backward(0)
    return backward, errors([dq[:, rows], dk[:, columns], dv[:, columns]], list(gradients or ()))


def run(bench: Bench, only: str) -> None:
    """All rows of one run, ceilings first and last."""
    device, dtype = bench.device, bench.dtype
    cost = TransformerCost()
    compiled_factor = cost.traffic_bytes("compiled") / cost.traffic_bytes("fused")
    bench.ceilings("first")
    for case in streaming_cases(bench, compiled_factor):
        if only in case.name:
            bench.streaming(case)
    if only in "attention cross_attention":
        heads, head = (2, 16) if bench.small else (attention.HEADS, attention.HEAD)
        lengths = [(16_384, 16_384), (65_520, 65_520)] if bench.quick else [(n, n) for n in (16_384, 32_760, 65_520)]
        lengths = [(40, 40), (40, 24)] if bench.small else [*lengths, (65_520, 512), (65_520, 257)]
        for case in attention.attention_cases(lengths, heads, head, BUFFERS, device, dtype):
            bench.attention(case, backward=True)
    bench.ceilings("last")


def streaming_cases(bench: Bench, compiled_factor: float) -> Iterator[cases.Case]:
    """Row ops at every token count, flow ops at one and twelve samples."""
    sizes = [8] if bench.small else [65_520] if bench.quick else [65_520, 32_760, 8_190]
    for tokens in sizes:
        yield from cases.row_cases(tokens, bench.device, bench.dtype, compiled_factor)
    for samples in (1, 2) if bench.small else (1, 12):
        yield from cases.flow_cases(samples, 64 if bench.small else 2_096_640, bench.device, bench.dtype)


def save(bench: Bench, out: Path | None) -> None:
    """Appends the rows to ``out``, or to a file named after the run; a self-check without ``out`` leaves no file."""
    device = re.sub(r"[^a-z0-9]+", "-", str(bench.rows[0]["device"]).lower()).strip("-")
    name = f"{bench.run_id}-{device}-{git('rev-parse', '--short=12', 'HEAD') or 'nogit'}.jsonl"
    path = out or (None if bench.small else RESULTS / name)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bench.rows)
    print(f"wrote {path}")


def options_parser(doc: str | None, things: str, quick: str) -> argparse.ArgumentParser:
    """The command line that the benchmarks share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: profiling/results/<utc>-<device>-<commit>.jsonl")
    parser.add_argument("--only", default="", help=f"{things} whose name contains this")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--self-check", action="store_true", help="tiny sizes on the CPU: exercises the harness only")
    return parser


def without_device(options: argparse.Namespace, instead: str) -> bool:
    """Says so where a run needs a CUDA device and there is none."""
    missing = not options.self_check and not torch.cuda.is_available()
    if missing:
        print(f"no CUDA device: use {instead}", file=sys.stderr)
    return missing


def main() -> int:
    """Entry point; 2 without a device."""
    parser = options_parser(__doc__, "ops", "the run's own shapes only: under ten minutes on one GPU")
    options = parser.parse_args()
    if without_device(options, "--self-check"):
        return 2
    torch.manual_seed(0)
    bench = Bench(torch.device("cpu" if options.self_check else "cuda"), quick=options.quick, small=options.self_check)
    try:
        run(bench, options.only)
    finally:  # a run that breaks off keeps what it has measured
        save(bench, options.out)
    exact = [row for row in bench.rows if row["kind"] == "kernel" and row["impl"] in ("ours", "triton")]
    missed = [row for row in exact if (row.get("rel_l2") or 0.0) > GATE]
    for row in missed:
        print(f"FAILED {row['name']} {row['direction']} {row['shape']}: error {row['rel_l2']:.3e}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
