"""How `bench_ops.py` takes a time: events, warm-ups, graph replays, poisoned memory, and what the machine was."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
BUFFERS = 3
"""Input sets used in turn: a [65520, 1536] bf16 operand is 201 MB, so three exceed three times every L2 cache."""
WARM_UPS = 10
REPLAYS = 20
SHORT_MS = 0.05
"""Below this the launch is as long as the kernel: the time is taken from a graph of `REPLAYS` calls."""
RIVAL_PACKAGES = ("flash-attn", "flash-attn-4", "liger-kernel", "sageattention", "quack-kernels")

Call = Callable[[int], Any]


def measure(call: Call, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of `call(buffer index)`: median, p20 and p80 of `repeats` after ten warm-ups."""
    for i in range(WARM_UPS):
        call(i % BUFFERS)
    times, graph, note = [_once(call, i % BUFFERS, device) for i in range(repeats)], False, ""
    if device.type == "cuda" and statistics.median(times) < SHORT_MS:
        try:
            times, graph = _replayed(call, device, repeats), True
        except RuntimeError as error:  # the call synchronises or copies from pageable memory
            torch.cuda.synchronize(device)
            note = f"includes launch time: no graph ({str(error).splitlines()[0]})"
    cuts = statistics.quantiles(times, n=10)
    return {
        "n_warm": WARM_UPS, "n_rep": repeats, "t_ms_median": statistics.median(times), "t_ms_p20": cuts[1],
        "t_ms_p80": cuts[7], "graph": graph, "note": note,
    }  # fmt: skip


def _once(call: Call, index: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call(index)
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(index)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _replayed(call: Call, device: torch.device, repeats: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(REPLAYS):
            call(i % BUFFERS)
    graph.replay()
    return [_once(lambda _: graph.replay(), 0, device) / REPLAYS for _ in range(repeats)]


def poison(device: torch.device, size: int) -> None:
    """Leaves NaNs in the memory that the next outputs will come from."""
    torch.full((size,), float("nan"), device=device)


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
    """SM and memory clock, temperature and power now; empty without nvidia-smi."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")
    if device.type != "cuda":
        return {}
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (part.strip() for part in text.split(",")), strict=False))


def environment(device: torch.device, run_id: str) -> dict[str, Any]:
    """First row of a result file: device, driver, versions, clocks, commit, command."""
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
