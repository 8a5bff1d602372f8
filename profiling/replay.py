"""Run a captured op call again: compare it with the reference and time it.

python profiling/replay.py FILE.safetensors [--device cuda] [--repeats 30]     (see geoalign_kernels/capture.py)
python profiling/replay.py FILE.safetensors --device cuda --profile            one call between profiler start, stop
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import geoalign_kernels as gk
from geoalign_kernels.capture import load

sys.path.insert(0, str(Path(__file__).parent / "ops"))  # scripts of one checkout, not a package

from bench_timing import errors, measure, side_stream


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with tensors of their own, in the same layout: an op may work in place."""
    return tuple(a.clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a for a in args)


def call_of(op: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Outputs of one call; for an op that works in place, what it left in its arguments."""
    args = copied(args)
    result = getattr(torch.ops.geoalign, op)(*args)
    leaves = torch.utils._pytree.tree_leaves(args if result is None else result)
    return [t for t in leaves if isinstance(t, torch.Tensor)]


def profile(op: str, args: tuple[Any, ...], warm_ups: int = 5) -> None:
    """One warm call of the op alone inside the profiler's range."""
    for _ in range(warm_ups):
        call_of(op, args)
    args = copied(args)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    getattr(torch.ops.geoalign, op)(*args)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    """Entry point; 1 if the call and its reference disagree by more than 1e-2 in relative L2, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls, including the copies of the inputs")
    parser.add_argument("--profile", action="store_true", help="open the profiler for one call; no comparison")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.profile and device.type != "cuda":
        print(f"--profile opens the CUDA profiler: it needs --device cuda, not '{device}'", file=sys.stderr)
        return 2
    op, args = load(options.file, device)
    with torch.no_grad(), side_stream(device):
        if options.profile:
            profile(op, args)
            return 0
        actual = call_of(op, args)
        if isinstance(args[-1], str):  # exact attention: its core is an argument, the reference is another core
            expected = call_of(op, (*args[:-1], "reference"))
        else:
            with gk.use_backend("reference"):
                expected = call_of(op, args)
        row = {"op": op, "device": str(device), **errors(actual, expected)}
        row |= measure(lambda _: call_of(op, args), device, max(2, options.repeats))
    print(json.dumps(row))
    return 0 if row["rel_l2"] <= 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
