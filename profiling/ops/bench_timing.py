"""How `bench_ops.py` takes a time and keeps it: events, graph replays, poisoned memory, the machine, the file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

SCHEMA = 3
FIELDS = (
    "schema", "run_id", "kind", "name", "variant", "impl", "status", "dtype", "shape", "direction", "n_warm", "n_rep",
    "t_ms_median", "t_ms_p20", "t_ms_p80", "bytes_min", "flops", "gbps", "tflops", "pct_copy", "pct_matmul", "rel_l2",
    "max_abs", "version", "level", "regs", "spill_bytes", "smem_bytes", "launches", "peak_mem_bytes", "graph",
    "predicted_ms", "note",
)  # fmt: skip
"""Every row but the first, which is the environment, has these; rows of reward models have more."""
L2_BYTES = 60 << 20
"""Where the device does not say: the largest of those in question."""
CALLS = ((20.0, 10, 30), (100.0, 3, 10), (math.inf, 2, 5))
"""(milliseconds below which, warm-ups, repeats): a call of 400 ms does not need forty."""
REPLAYS = 20
SHORT_MS = 0.05
"""Below this the gaps between launches count: the time is taken from a graph of `REPLAYS` calls."""
LONG_MS = 5.0
"""From here on calls follow each other without a pause: a card that rests in between runs at a clock it cannot keep."""
AHEAD_CYCLES = 2_500_000
"""1.3 to 1.8 ms of a GPU's clock, in which Python enqueues the timed call."""
RIVAL_PACKAGES = (
    "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "sageattention", "flashinfer-python", "sglang",
    "sgl-kernel", "quack-kernels", "torchao",
)  # fmt: skip

Call = Callable[[int], Any]


def buffers_for(set_bytes: float, device: torch.device) -> int:
    """How many sets of operands to use in turn, so that together they exceed three times the L2 cache; 3 to 64."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return int(min(64, max(3, -(-3 * (size or L2_BYTES) // max(1, set_bytes))))) if device.type == "cuda" else 3


def calls_for(ms: float) -> tuple[int, int]:
    """(warm-ups, repeats) of a call that takes so long."""
    return next((warm, repeats) for below, warm, repeats in CALLS if ms < below or below == math.inf)


def measure(call: Call, device: torch.device, most: int, buffers: int = 1) -> dict[str, Any]:
    """Milliseconds of `call(buffer index)`: median, p20 and p80 of as many calls as `calls_for` says, `most` at most.

    On a GPU a call below `SHORT_MS` is timed as a graph of `REPLAYS` calls, which takes a `side_stream`.
    """
    call(0)  # what is compiled or allocated at the first call
    about_ms = _by_wall(call, device, 1 % buffers)
    warm_ups, repeats = calls_for(about_ms)
    repeats = min(repeats, most)
    for i in range(2, warm_ups):
        call(i % buffers)
    apart = about_ms < LONG_MS
    times, graph, note = _series(call, device, repeats, buffers, apart), False, ""
    if device.type == "cuda" and statistics.median(times) < SHORT_MS:
        try:
            times, graph = _replayed(call, device, repeats, buffers), True
        except RuntimeError as error:  # the call synchronises or copies from pageable memory
            torch.cuda.synchronize(device)
            note = f"includes launches: no graph ({str(error).splitlines()[0]})"
    cuts = statistics.quantiles(times, n=10)
    return {
        "n_warm": warm_ups, "n_rep": repeats, "t_ms_median": statistics.median(times), "t_ms_p20": cuts[1],
        "t_ms_p80": cuts[7], "graph": graph, "note": note,
    }  # fmt: skip


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Everything inside runs on one stream that a graph can capture.

    A backward runs on the stream of its forward: from the default stream, a capture of it would fail or be empty.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _series(call: Call, device: torch.device, repeats: int, buffers: int, apart: bool) -> list[float]:
    """Milliseconds of each of `repeats` calls; where they are `apart` a GPU sleeps before each.

    It then never waits for Python inside a call; a long call leaves Python the time to enqueue the next one.
    """
    if device.type != "cuda":
        return [_by_wall(call, device, i % buffers) for i in range(repeats)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        if apart:
            torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        call(i % buffers)
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def _by_wall(call: Call, device: torch.device, index: int) -> float:
    """Milliseconds on the clock of the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _replayed(call: Call, device: torch.device, repeats: int, buffers: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        for i in range(REPLAYS):
            call(i % buffers)

    def replay(_: int) -> None:
        graph.replay()

    replay(0)
    if count_launches(call, device) and not count_launches(replay, device):
        raise RuntimeError("the captured graph is empty")
    return [ms / REPLAYS for ms in _series(replay, device, repeats, 1, True)]


def on_poison(call: Call, inputs: Iterable[torch.Tensor]) -> Any:
    """`call(0)` once more, into memory that its first results have left full of NaNs.

    The allocator hands the same blocks out again, so an element that the call does not write shows. Results that are
    an input handed through are left alone.
    """
    given = {t.untyped_storage().data_ptr() for t in inputs}
    for t in torch.utils._pytree.tree_leaves(call(0)):
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
            t.detach().fill_(float("nan"))
    return call(0)


def count_launches(call: Call, device: torch.device) -> int | None:
    """Device kernels of one call; None on a CPU or where the profiler has no access to counters."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call(0)
            torch.cuda.synchronize(device)
        return sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    except RuntimeError:
        return None


def errors(actual: Any, truth: Any) -> dict[str, float]:
    """Largest relative L2 and absolute error over the tensors of two results; infinite if anything is not finite."""
    relative, absolute = 0.0, 0.0
    pairs = zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(truth), strict=True)
    for got, want in pairs:
        if want.numel() == 0:  # a gradient that was not asked for
            continue
        difference, exact = got.double() - want.double(), want.double()
        if not bool(torch.isfinite(difference).all()):
            return {"rel_l2": float("inf"), "max_abs": float("inf")}
        relative = max(relative, (difference.norm() / exact.norm().clamp_min(1e-30)).item())
        absolute = max(absolute, difference.abs().max().item())
    return {"rel_l2": relative, "max_abs": absolute}


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def clocks(device: torch.device) -> dict[str, str]:
    """SM and memory clock, temperature and power of ``device`` now; empty without nvidia-smi.

    The card is named by its UUID: nvidia-smi counts all cards, also those that CUDA_VISIBLE_DEVICES hides.
    """
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")
    if device.type != "cuda":
        return {}
    try:
        card = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={card}"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (AttributeError, OSError, subprocess.SubprocessError):  # a torch that knows no UUID
        return {}
    return dict(zip(fields, (part.strip() for part in text.split(",")), strict=False))


def environment(device: torch.device, run_id: str) -> dict[str, Any]:
    """First row of a result file: device, driver, versions, clocks, commit, command; the end of the run adds to it."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    versions = {}
    for package in ("torch", "triton", *RIVAL_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "kind": "environment",
        "device": properties.name if properties else platform.machine(),
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "l2_bytes": properties.L2_cache_size if properties else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "clocks_before": clocks(device),
        "clocks_after": None,
        "steady": None,
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def git(*arguments: str) -> str:
    """Output of a git command in this checkout, empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class ResultFile:
    """JSON lines, written as they come: a run that is killed keeps what it has measured."""

    def __init__(self, path: Path | None, first: dict[str, Any]) -> None:
        self.path, self.rows = path, [first]
        self._write("w")

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self.rows.append(row)
        self._write("a", row)

    def amend(self, **more: Any) -> None:
        """Adds what became known after the last row was written."""
        self.rows[-1] |= more
        self._write("w")

    def complete(self, **more: Any) -> None:
        """Adds to the environment row what is known later only."""
        self.rows[0] |= more
        self._write("w")

    def _write(self, mode: str, *rows: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows or self.rows)
