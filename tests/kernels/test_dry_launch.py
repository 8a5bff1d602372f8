"""Every kernel compiles at the edges of its domain for both targets, within the shared memory of a block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from geoalign_kernels.static.check import SHARED_LIMIT

ROOT = Path(__file__).parents[2]


@pytest.mark.aot
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_launches_at_the_edges_compile(target: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("dry_launch.py")), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case for case in cases if case["error"]] == []
    assert all(shared <= SHARED_LIMIT[target] for case in cases for _, shared in case["launches"])
    launched = {(case["case"].partition(",")[0], kernel) for case in cases for kernel, _ in case["launches"]}
    rows = {"qk_norm_rotary", "qk_norm only", "unrotate_gate_norm", "gate and norm", "modulated_norm", "rms_norm"}
    assert {(name, f"{direction}_kernel") for name in rows for direction in ("forward", "backward")} <= launched
    flow = {"step_kernel", "log_prob_kernel", "log_prob_finish_kernel", "log_prob_backward_kernel"}
    attention = {"attention_kernel", "quantise_kernel", *(["quantise_values_kernel"] if target == 90 else [])}
    assert flow | attention | {"gate_kernel", "value_backward_kernel"} <= {kernel for _, kernel in launched}
