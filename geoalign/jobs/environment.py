"""What a result is worthless without: versions, hardware and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geoalign.training.processes.launcher import started_by_launcher
from geoalign.version import __version__


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and commit that a result is worthless without."""
    return {
        "versions": {
            "geoalign": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": os.cpu_count(),
        "commit": source_commit(),
        "command": " ".join(sys.argv),
    }


def describe_processes() -> dict[str, Any]:
    """How many processes the run has, on how many machines, and whether torchrun started them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = count // int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return {"count": count, "nodes": nodes, "torchrun": count > 1 and not started_by_launcher()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def source_commit() -> str:
    """Commit of the source tree the package runs from (with ``-dirty``), or "installed" for a wheel.

    Changed documents and result files do not count: one run of a study must not mark the next one.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "installed"
    call: Callable[..., str] = lambda *args: subprocess.run(  # noqa: E731 - two calls of one command
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    ).stdout.strip()
    code = (".", ":!docs", ":!profiling/results")
    dirty = call("status", "--porcelain", "--untracked-files=no", "--", *code)
    return call("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
