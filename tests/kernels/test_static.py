"""The shipped kernels compile for both targets without spills and as the checked-in table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from geoalign_kernels.static import check as static

ROOT = Path(__file__).parents[2]
COLUMNS = ("kernel", "target", "registers", "spill_bytes", "shared_bytes", "global_loads_128", "global_loads", "mma")
MANDATORY = (
    "qk_norm_rotary.forward", "qk_norm_rotary.backward", "unrotate_gate_norm.forward", "unrotate_gate_norm.backward",
    "modulated_norm.forward", "modulated_norm.backward", "flow_step.step", "flow_step.log_prob_backward",
    "attention.attention / exact bf16", "attention.attention / int8 scores, bf16 values",
)  # fmt: skip


def check(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Runs the command in a process without the interpreter flag; its result and its rows."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "geoalign_kernels.static", "--json", str(folder / "rows.json"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, json.loads((folder / "rows.json").read_text())


@pytest.mark.aot
def test_every_kernel_passes_its_gates(tmp_path: Path) -> None:
    done, rows = check(tmp_path)
    assert done.returncode == 0, done.stderr
    spilled = {(row["kernel"], row["config"], row["target"]): row["spill_bytes"] for row in rows if row["spill_bytes"]}
    assert set(spilled) <= {("attention.attention", "exact bf16", "sm_80")} and max(spilled.values(), default=0) <= 64
    a800 = [row for row in rows if row["kernel"] == "attention.attention" and row["target"] == "sm_80"]
    assert len(a800) == 2 and all(row["shared_cycles"] <= row["tensor_cycles"] for row in a800)
    assert all(isinstance(row[column], str if column in ("kernel", "target", "mma") else int)
               for row in rows for column in COLUMNS)  # fmt: skip
    for name in MANDATORY:
        targets = {row["target"] for row in rows if f"{row['kernel']} / {row['config']}".startswith(name)}
        assert targets == {"sm_80", "sm_90"}, name
    (fp8,) = [row for row in rows if row["config"] == "int8 scores, fp8 values"]
    assert fp8["target"] == "sm_90" and set(fp8["mma"].split("+")) == {"IGMMA", "QGMMA"}
    assert "fp8" in fp8["not_applicable"]["sm_80"] and "not applicable" in done.stdout


@pytest.mark.aot
def test_a_changed_kernel_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a real kernel, compiled here, against an expectation that differs in one number at a time."""
    done, (row, *_) = check(tmp_path, "--only", "gated_residual.gate / bf16; forward / sm_80")
    assert done.returncode == 0, done.stderr
    # The rows of this very Triton: the checked-in table belongs to the pinned one.
    key, expected = static._key(row), {field: row[field] for field in static.FIELDS}
    table = json.loads(static.EXPECTATIONS.read_text()) | {"triton": triton.__version__}
    table["rows"][key] = expected
    assert static.drift(row, table) == [] == static.narrow_accesses(row)
    for field in static.EXACT_FIELDS:
        changed = {**expected, field: "HMMA" if field == "mma" else expected[field] + 1}
        found = static.drift(row, {"rows": {key: changed}})
        assert found == [f"{field}: {changed[field]} -> {expected[field]}"]
    for difference, noticed in ((8, False), (9, True), (-9, True)):
        changed = {**expected, "registers": row["registers"] + difference}
        assert bool(static.drift(row, {"rows": {key: changed}})) == noticed
    # an access that became narrow
    assert "1 global loads below 16 bytes" in static.narrow_accesses({**row, "global_loads_128": 11})[0]
    # the command itself, on a table whose entry was tampered with, and one that lists a kernel nobody makes
    for change in ({key: {**expected, "global_loads": 99}}, {"gone / x / sm_80": expected}):
        monkeypatch.setattr(static, "EXPECTATIONS", tmp_path / "table.json")
        static.EXPECTATIONS.write_text(json.dumps({**table, "rows": {**table["rows"], **change}}))
        monkeypatch.setattr(static, "compile_row", lambda config, target: _row_of(table, config, target, row))
        _, problems = static.check()
        assert len(problems) == 1 and next(iter(change)) in problems[0], problems


def _row_of(table: dict[str, Any], config: Any, target: int, like: dict[str, Any]) -> dict[str, Any]:
    """The row that the checked-in table promises for a configuration, in place of a compilation."""
    head = {"kernel": config.kernel_name, "config": config.label, "target": f"sm_{target}"}
    narrow = [item._asdict() for item in (*config.narrow, *config.narrow_by_target.get(target, ()))]
    spill = config.spills[head["target"]]._asdict() if head["target"] in config.spills else None
    given = {"narrow": narrow, "expected_mma": config.mma, "spill": spill}
    return {**like, **head, **table["rows"][static._key(head)], **given}


def test_gates_catch_spills_missing_tensor_cores_and_drift() -> None:
    row = {
        "kernel": "k", "config": "c", "target": "sm_80", "registers": 255, "warps": 16, "spill_bytes": 8,
        "stack_bytes": 0, "shared_bytes": 170_000, "fp64": 1, "mma": "", "expected_mma": {"sm_80": "HMMA"},
        "mma_in_series": 1, "spill": None,
    }  # fmt: skip
    text = " ".join(static.violations(row))
    for word in ("spill_bytes", "fp64", "shared memory", "register file", "HMMA", "mma_in_series"):
        assert word in text
    listed = {**row, "spill": {"reason": "worth it", "bytes": 8}}
    assert "spill_bytes" not in " ".join(static.violations(listed))
    assert "at most 8" in " ".join(static.violations({**listed, "spill_bytes": 9}))
    full = row | dict.fromkeys(static.FIELDS, 0) | {"mma": ""}
    table = {"rows": {"k / c / sm_80": {**full, "global_loads_128": 3}}}
    assert static.drift(full, table) == ["global_loads_128: 3 -> 0"]
    assert "no such row" in static.drift(full, {"rows": {}})[0]


def test_blocks_of_a_multiprocessor_are_limited_by_what_runs_out_first() -> None:
    row = {"target": "sm_80", "warps": 4, "registers": 32, "shared_bytes": 0}
    assert static.blocks_per_sm(row) == 16  # 2048 threads
    assert static.blocks_per_sm({**row, "registers": 255}) == 2  # 65,536 / (256 x 128)
    assert static.blocks_per_sm({**row, "shared_bytes": 80 * 1024}) == 2  # 164 KiB / 81 KiB
