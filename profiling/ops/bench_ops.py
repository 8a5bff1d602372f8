"""Microbenchmarks of the kernels against their rivals, as fractions of ceilings measured in the same process.

    python profiling/ops/bench_ops.py [--quick] [--only NAME] [--out FILE.jsonl]     on a CUDA device
    python profiling/ops/bench_ops.py --self-check [--out FILE.jsonl]                on any machine, tiny sizes

Ceilings (device copy, matrix products) come first and last: if one moved by more than 3 % the run is unsteady and not
to be quoted. Inputs are random; sets of them are used in turn so that nothing stays in the L2 cache. Every row carries
the error of that implementation against float64 on sampled rows, taken in the same run. A rival that is absent has a
row with `status` "not run". `predicted_ms` is what the cost model said before the run.

Rows come in the order of their worth: what this project runs (its kernels, the attention core of a training run, 8-bit
modes), forwards before backwards; then rivals; then what `torch.compile` has to make. `--quick` takes the shapes of a
run only and ends within ten minutes on one GPU; `--until` sets another end. What would not end by then is a "not run"
row. A row that fails is a "failed" row with its error, and the run goes on. Exit code: 0, or 1 if a row failed or an
exact row misses its error gate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_attention as attention
import bench_cases as cases
import bench_libraries as libraries
import bench_products as products
import torch
from bench_prices import CEILINGS_S, COMPILED, Prices
from bench_timing import (
    FIELDS,
    SCHEMA,
    ResultFile,
    buffers_for,
    clocks,
    count_launches,
    environment,
    measure,
    side_stream,
)
from deadline import Deadline
from torch._subclasses.fake_tensor import FakeTensorMode

from geoalign.perf.cost import TransformerCost
from geoalign.perf.devices import profile_of
from geoalign_kernels.static.check import EXPECTATIONS

GATE = 1e-2
"""Largest relative L2 error of an exact bf16 row; quantised rows are reported, not gated."""
STEADY = 0.03
GEMMS = ((65_520, 1536, 1536), (65_520, 1536, 4608), (65_520, 1536, 8960), (65_520, 8960, 1536))  # rows, in, out
RESULTS = Path(__file__).parents[1] / "results"
QUICK_S = 540.0
"""Seconds that a quick run takes at most."""
WARM_S, WARM_CALLS = 2.0, 400
"""How long large products warm the card before ceilings are taken, and how many then hide a look at its clocks."""
Row = dict[str, Any]
AnyCase = cases.Case | attention.AttentionCase
Planned = tuple[AnyCase, str, str]
"""(case, implementation, direction) of a row."""


class Bench:
    """One run: the device, how often to repeat at most, by when to end, the ceilings found so far, the rows."""

    def __init__(
        self, device: torch.device, out: Path | None, *, quick: bool, small: bool, deadline: Deadline | None = None
    ) -> None:
        self.device, self.small, self.quick, self.deadline = device, small, quick, deadline or Deadline()
        self.lost = ""
        self.repeats = 5 if small else 30
        self.dtype = torch.float32 if small else torch.bfloat16
        self.run_id = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        first = environment(device, self.run_id)
        name = re.sub(r"[^a-z0-9]+", "-", str(first["device"]).lower()).strip("-")
        default = RESULTS / f"{self.run_id}-{name}-{first['commit'] or 'nogit'}.jsonl"
        self.file = ResultFile(out or (None if small else default), first)
        self.ceiling: dict[str, float] = {}
        self.missed: list[Row] = []
        self.profile = profile_of(str(first["device"])) if device.type == "cuda" else None
        self.prices = Prices(self.profile)
        table = json.loads(EXPECTATIONS.read_text())
        # Registers are another compiler's business: the table says nothing of kernels that another Triton makes.
        self.static = table["rows"] if table["triton"] == first["versions"]["triton"] else {}

    def add(self, kind: str, name: str, impl: str, **fields: Any) -> Row:
        """Appends a row with all fields of the schema and prints it."""
        row = dict.fromkeys(FIELDS) | {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "kind": kind,
            "name": name,
            "impl": impl,
        }
        if kind == "kernel":
            level = libraries.level_of(impl, fields.get("variant", ""))
            row |= {"version": libraries.version_of(impl), "level": level}
        row |= {"status": "ok", "dtype": str(self.dtype).removeprefix("torch."), "variant": "", "note": "", **fields}
        assert kind == "reward" or set(row) == set(FIELDS), set(row) ^ set(FIELDS)
        time_ms = row["t_ms_median"]
        if time_ms and row["bytes_min"]:
            row["gbps"] = 1e-6 * row["bytes_min"] / time_ms
            row["pct_copy"] = 100.0 * row["gbps"] / self.ceiling["copy"] if "copy" in self.ceiling else None
        if time_ms and row["flops"]:
            row["tflops"] = 1e-9 * row["flops"] / time_ms
            row["pct_matmul"] = 100.0 * row["tflops"] / self.ceiling["matmul"] if "matmul" in self.ceiling else None
        self.file.add(row)
        shown = f"{time_ms:10.4f} ms" if time_ms else f"{row['status']}: {row['note']}"
        label = f"{name} {row['variant']}".strip()
        print(f"{label:38s} {row['direction'] or '':4s} {impl:12s} {row['shape']!s:28s} {shown}", flush=True)
        return row

    @property
    def rows(self) -> list[Row]:
        """All rows so far, the environment first."""
        return self.file.rows

    def not_run(
        self, name: str, impl: str, direction: str, shape: Sequence[int], reason: str, variant: str = ""
    ) -> None:
        """A row for what was not timed, so that its absence is visible."""
        self.add("kernel", name, impl, variant=variant, direction=direction, shape=list(shape), status="not run",
                 note=reason)  # fmt: skip

    def ceilings(self, when: str) -> None:
        """Copy (read and write counted) and matrix products on a warm card; the later call says if it was steady."""
        self.file.complete(**{"clocks_after" if self.ceiling else "clocks_before": self.warm_up()})
        size = 1 << (14 if self.small else 30)  # 4 GiB read and 4 GiB written
        source, target = torch.randn(size, device=self.device), torch.empty(size, device=self.device)
        copy = measure(lambda _, to=target, source=source: to.copy_(source), self.device, self.repeats)
        found = {
            "copy": self.add("ceiling", "copy", when, dtype="float32", shape=[size], bytes_min=8.0 * size, **copy)[
                "gbps"
            ]
        }
        del source, target
        side = 64 if self.small else 8192
        for m, k, n in [(side, side, side), *(GEMMS if not self.small else [(side, 32, 96)])]:

            def make(shape: tuple[int, int]) -> torch.Tensor:
                return torch.randn(shape, device=self.device).to(self.dtype)

            moved = (m * k + k * n + m * n) * self.dtype.itemsize
            pairs = [(make((m, k)), make((k, n))) for _ in range(buffers_for(moved, self.device))]
            flops = 2.0 * m * k * n
            predicted = 1e3 * flops / self.profile.matmul if self.profile else None
            timing = measure(lambda i, pairs=pairs: pairs[i][0] @ pairs[i][1], self.device, self.repeats, len(pairs))
            row = self.add("ceiling", "matmul", when, shape=[m, k, n], flops=flops, predicted_ms=predicted, **timing)
            found.setdefault("matmul", row["tflops"])
        if self.ceiling:
            moved_by = {name: found[name] / self.ceiling[name] - 1.0 for name in found}
            steady = all(abs(change) <= STEADY for change in moved_by.values())
            self.file.complete(steady=steady, ceilings_moved=moved_by)
            print("steady" if steady else f"UNSTEADY, not to be quoted: {moved_by}")
        self.ceiling = self.ceiling or found

    def warm_up(self) -> dict[str, str]:
        """Keeps the card busy with products until it runs at the clock that it can keep; its clocks while it does."""
        if self.device.type != "cuda":
            return {}
        a, b = (torch.randn(8192, 8192, device=self.device).to(self.dtype) for _ in range(2))
        began = time.perf_counter()
        while time.perf_counter() - began < WARM_S:
            for _ in range(50):
                a @ b
            torch.cuda.synchronize(self.device)
        for _ in range(WARM_CALLS):
            a @ b
        found = clocks(self.device)  # asked while the card works
        torch.cuda.synchronize(self.device)
        return found

    def static_numbers(self, name: str, direction: str, impl: str) -> Row:
        """Registers, spills and shared memory of our kernels here, where the checked-in table is of the same Triton.

        An op with several configurations has the largest of each.
        """
        if self.device.type != "cuda" or impl not in ("ours", "triton", *attention.QUANTISED):
            return {}
        major, minor = torch.cuda.get_device_capability(self.device)
        name = {"flow_log_prob": "flow_step.log_prob", "cross_attention": "attention"}.get(name, name)
        label = {"triton": "exact", "int8": "int8 scores, bf16", "int8_fp8": "int8 scores, fp8"}.get(impl, "")
        keys = [k for k in self.static if k.startswith(name) and label in k and k.endswith(f"sm_{major}{minor}")]
        keys = [k for k in keys if ("backward" in k.partition(" / ")[0]) == (direction == "bwd")]
        fields = (("regs", "registers"), ("spill_bytes", "spill_bytes"), ("smem_bytes", "shared_bytes"))
        return {new: max(self.static[k][old] for k in keys) for new, old in fields} if keys else {}

    def cases(self, found: Iterable[AnyCase]) -> None:
        """All rows of some cases, in the order of their worth."""
        for case, impl, direction in by_worth(found):
            reason = case.absent(impl) or self.lost or self.late(self.prices.row(case, impl, direction))
            if reason:
                self.not_run(case.name, impl, direction, case.shape, reason, case.variant)
                continue
            self.prices.pay(case, impl, direction)
            try:
                self.time(case, impl, direction)
            except torch.OutOfMemoryError as error:
                self.not_run(case.name, impl, direction, case.shape, first_line(error), case.variant)
            except Exception as error:  # whatever it is, it costs this row only
                self.add("kernel", case.name, impl, variant=case.variant, direction=direction,
                         shape=list(case.shape), status="failed", note=first_line(error))  # fmt: skip
                self.lost = lost_device(self.device)

    def late(self, seconds: float) -> str:
        """Why work of so many seconds is not started any more; the last ceilings have to fit, too. Empty if it is."""
        return self.deadline.late(seconds + CEILINGS_S)

    def time(self, case: AnyCase, impl: str, direction: str) -> None:
        """Checks one implementation, times it, adds its row."""
        call, check = case.prepare(impl, direction)
        errors = check()
        peak = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        timing = measure(call, self.device, self.repeats, case.buffers)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        work = case.work[direction]
        row = self.add(
            "kernel", case.name, impl, variant=case.variant, shape=list(case.shape), direction=direction,
            bytes_min=work.bytes_min, flops=work.flops, launches=count_launches(call, self.device), peak_mem_bytes=peak,
            predicted_ms=case.predicted_ms(self.profile, impl, direction) if self.profile else None,
            **self.static_numbers(case.name, direction, impl), **timing, **errors,
        )  # fmt: skip
        if impl in case.gated and (row["rel_l2"] or 0.0) > GATE:
            self.missed.append(row)


def by_worth(found: Iterable[AnyCase]) -> list[Planned]:
    """The rows of some cases: what this project runs, forwards before backwards; rivals; what has to be compiled."""
    rows = [(case, *row) for case in found for row in case.rows]

    def worth(row: Planned) -> int:
        case, impl, direction = row
        return int(direction == "bwd") if case.first(impl) else 3 if impl in COMPILED else 2

    return sorted(rows, key=worth)


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def lost_device(device: torch.device) -> str:
    """Why nothing more can run in this process: after an illegal access a CUDA context refuses everything."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return f"the device was lost to an earlier row ({first_line(error)})"
    return ""


def chosen(name: str, only: str) -> bool:
    """Whether `--only` (parts of names, separated by commas) asks for a name."""
    return any(part in name for part in only.split(","))


def groups(bench: Bench) -> list[tuple[str, Callable[[], Iterator[AnyCase]]]]:
    """(names of the cases, what makes them) in the order of the run; one group's operands exist at a time."""
    cost, device, dtype, small = TransformerCost(), bench.device, bench.dtype, bench.small
    factor = cost.traffic_bytes("compiled") / cost.traffic_bytes("fused")
    sizes = [8] if small else [65_520] if bench.quick else [65_520, 32_760, 8_190]
    streams = (torch.float64, dtype) if small else (torch.float32,) if bench.quick else (torch.float32, dtype)
    lengths = [(n, n) for n in ((65_520, 16_384) if bench.quick else (65_520, 32_760, 16_384))]
    lengths = [(40, 40), (40, 24)] if small else [*lengths, (65_520, 512), (65_520, 257)]
    elements = 64 if small else 2_096_640
    found: list[tuple[str, Callable[[], Iterator[AnyCase]]]] = []
    for tokens in sizes:
        found.append((
            "qk_norm_rotary rms_norm unrotate_gate_norm modulated_norm gated_residual",
            lambda tokens=tokens: cases.row_cases(tokens, device, dtype, streams, factor),
        ))  # fmt: skip
    for samples in (1, 2) if small else (1, 12):
        found.append((
            "flow_step flow_log_prob", lambda samples=samples: cases.flow_cases(samples, elements, device, dtype)
        ))  # fmt: skip
    heads, head = (2, 16) if small else (attention.HEADS, attention.HEAD)
    found.append((
        "attention cross_attention", lambda: attention.attention_cases(lengths, heads, head, device, dtype)
    ))  # fmt: skip
    shape = (32, 32, 64) if small else products.FFN
    found.append(("ffn_product", lambda: products.product_cases(*shape, device, dtype)))
    return found


def estimate(bench: Bench, only: str) -> list[tuple[Planned, float]]:
    """(row, seconds) of everything that is there, in the order of the run, at the prices of this card."""
    libraries.import_all()  # a module that makes tensors where it is imported must not make them fake ones
    prices, found = Prices(bench.profile), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in all_cases(bench, only):
            rows = [row for row in by_worth(group) if not row[0].absent(row[1])]
            found += [(row, prices.pay(*row)) for row in rows]
    return found


def all_cases(bench: Bench, only: str) -> Iterator[list[AnyCase]]:
    """The cases of a run whose name contains `only`, one group at a time."""
    for names, make in groups(bench):
        if any(chosen(name, only) for name in names.split()):
            yield [case for case in make() if chosen(case.name, only)]


def run(bench: Bench, only: str) -> None:
    """All rows of one run, ceilings first and last."""
    with side_stream(bench.device):
        bench.ceilings("first")
        for group in all_cases(bench, only):
            bench.cases(group)
        if not bench.lost:
            bench.ceilings("last")


def options_parser(doc: str | None, things: str | None, quick: str) -> argparse.ArgumentParser:
    """The command line that the benchmarks share; `things` are what `--only` chooses from, if there is a choice."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: profiling/results/<utc>-<device>-<commit>.jsonl")
    if things:
        parser.add_argument("--only", default="", help=f"{things} whose name contains one of these parts (a,b)")
    parser.add_argument(
        "--until", type=float, help="the time (date +%%s) by which to end: start nothing that would not"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--self-check", action="store_true", help="tiny sizes on the CPU: exercises the harness only")
    return parser


def bench_of(options: argparse.Namespace, instead: str) -> Bench | None:
    """The run that the command line asks for; None, said so, where it needs a CUDA device and there is none."""
    if not options.self_check and not torch.cuda.is_available():
        print(f"no CUDA device: use {instead}", file=sys.stderr)
        return None
    device = torch.device("cpu" if options.self_check else "cuda")
    until = options.until or (time.time() + QUICK_S if options.quick else math.inf)
    return Bench(device, options.out, quick=options.quick, small=options.self_check, deadline=Deadline(until))


def main() -> int:
    """Entry point; 2 without a device."""
    options = options_parser(__doc__, "ops", "the run's own shapes only: under ten minutes on one GPU").parse_args()
    torch.manual_seed(0)
    bench = bench_of(options, "--self-check")
    if bench is None:
        return 2
    if not bench.small:
        seconds = sum(price for _, price in estimate(bench, options.only)) + 2 * CEILINGS_S
        print(f"predicted: {seconds:.0f} s (compilers and exact results assumed) of {bench.deadline.left_s:.0f}")
    run(bench, options.only)
    if bench.file.path:
        print(f"wrote {bench.file.path}")
    failed = [row for row in bench.rows if row.get("status") == "failed"]
    for row in [*bench.missed, *failed]:
        what = row["note"] if row in failed else f"error {row['rel_l2']:.3e}"
        print(f"FAILED {row['name']} {row['variant']} {row['direction']} {row['shape']}: {what}", file=sys.stderr)
    return 1 if bench.missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
