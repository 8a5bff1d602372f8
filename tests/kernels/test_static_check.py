"""The shipped kernels compile for both targets without spills and as the checked-in table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from geoalign_kernels import static_check

ROOT = Path(__file__).parents[2]


@pytest.mark.aot
def test_every_kernel_passes_its_gates(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "geoalign_kernels.static_check", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert all(row["spill_bytes"] == 0 for row in rows)


def test_gates_catch_spills_missing_tensor_cores_and_drift() -> None:
    row = {
        "kernel": "k", "config": "c", "target": "sm_80", "registers": 255, "warps": 16, "spill_bytes": 8,
        "stack_bytes": 0, "shared_bytes": 170_000, "fp64": 1, "mma": "", "expected_mma": {"sm_80": "HMMA"},
    }  # fmt: skip
    text = " ".join(static_check.violations(row))
    for word in ("spill_bytes", "fp64", "shared memory", "register file", "HMMA"):
        assert word in text
    full = row | dict.fromkeys(static_check.FIELDS, 0) | {"mma": ""}
    table = {"rows": {"k / c / sm_80": {**full, "global_loads_128": 3}}}
    assert static_check.drift(full, table) == ["global_loads_128: 3 -> 0"]
    assert "no such row" in static_check.drift(full, {"rows": {}})[0]
