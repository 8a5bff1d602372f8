"""The one way by which a test starts a group of processes, so that they can be counted (see ``tests/conftest.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests/support"))


@pytest.fixture
def launch(request: pytest.FixtureRequest) -> Callable[..., subprocess.Popen[str]]:
    """``launch(processes, *command, folder=...)`` by torchrun; no oftener than ``dist(groups)`` of the test says."""
    declared = request.node.get_closest_marker("dist") or request.node.get_closest_marker("multigpu")
    left = iter(range(declared.kwargs.get("groups", 1)))

    def start(processes: int, *command: str, folder: Path) -> subprocess.Popen[str]:
        assert next(left, None) is not None, "the test starts more groups of processes than its marker dist says"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "PYTHONFAULTHANDLER": "1"}
        return subprocess.Popen(
            [sys.executable, *(torchrun if processes > 1 else ()), *command],
            cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start
