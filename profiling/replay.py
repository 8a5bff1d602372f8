"""Run a captured op call again: compare it with the reference and time it.

python profiling/replay.py FILE.safetensors [--device cuda] [--repeats 30]     (see geoalign_kernels/capture.py)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_timing import errors, measure

import geoalign_kernels as gk
from geoalign_kernels.capture import load


def call_of(op: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Outputs of one call; for an op that works in place, what it left in its arguments."""
    args = tuple(a.clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a for a in args)
    result = getattr(torch.ops.geoalign, op)(*args)
    return torch.utils._pytree.tree_leaves(args if result is None else result)


def main() -> int:
    """Entry point; 1 if the call and its reference disagree by more than 1e-2 in relative L2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls, including the copies of the inputs")
    options = parser.parse_args()
    device = torch.device(options.device)
    op, args = load(options.file, device)
    with torch.no_grad():
        actual = [t for t in call_of(op, args) if isinstance(t, torch.Tensor)]
        if op.startswith("attention"):  # the core is an argument: the reference is another core
            expected = call_of(op, (*args[:-1], "reference") if isinstance(args[-1], str) else args)
        else:
            with gk.use_backend("reference"):
                expected = [t for t in call_of(op, args) if isinstance(t, torch.Tensor)]
        row = {"op": op, "device": str(device), **errors(actual, expected)}
        row |= measure(lambda _: call_of(op, args), device, max(2, options.repeats))
    print(json.dumps(row))
    return 0 if row["rel_l2"] <= 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
