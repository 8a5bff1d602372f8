"""Runs a script of `profiling/` in a process of its own, and what the rows of its result file hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
SCHEMA = (
    "schema run_id kind name variant impl status dtype shape direction n_warm n_rep t_ms_median t_ms_p20 t_ms_p80 "
    "bytes_min flops gbps tflops pct_copy pct_matmul rel_l2 max_abs version level regs spill_bytes smem_bytes launches "
    "peak_mem_bytes graph predicted_ms note"
)  # fmt: skip


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kernel_row(name: str, impl: str, ms: float, **fields: Any) -> dict[str, Any]:
    row = dict.fromkeys(SCHEMA.split()) | {"kind": "kernel", "status": "ok", "name": name, "impl": impl, "variant": ""}
    return row | {"direction": "fwd", "shape": [65_520], "dtype": "bfloat16", "t_ms_median": ms, **fields}
