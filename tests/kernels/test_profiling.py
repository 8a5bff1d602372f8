"""The benchmark harness end to end on the CPU: its rows, the report made from them, capture and replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "self.jsonl"
    done = script("profiling/bench_ops.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_self_check_writes_every_kind_of_row(results: Path) -> None:
    rows = rows_of(results)
    assert rows[0]["kind"] == "environment" and {"versions", "commit", "dirty", "command"} <= set(rows[0])
    assert rows[1]["kind"] == "ceiling" and rows[-1]["kind"] == "steadiness"
    kernels = [row for row in rows if row["kind"] == "kernel"]
    for name in ("qk_norm_rotary", "unrotate_gate_norm", "modulated_norm", "gated_residual", "flow_log_prob"):
        for direction in ("fwd", "bwd"):
            for impl in ("ours", "eager", "compiled"):
                # float32 results against float64: far below the gate, so a wrong formula cannot hide behind it
                (row,) = [r for r in kernels if (r["name"], r["direction"], r["impl"]) == (name, direction, impl)][:1]
                assert row["status"] == "ok" and row["rel_l2"] <= 1e-5, row
    absent = {row["impl"] for row in kernels if row["status"] == "not run"}
    assert "sdpa_cudnn" in absent and all(row["note"] for row in kernels if row["status"] == "not run")


def test_report_lists_every_timed_row_and_draws_every_point(results: Path, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    done = script("profiling/figures.py", str(results), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(results)
    timed = [row for row in rows if row["kind"] == "kernel" and row["status"] == "ok"]
    table = (tmp_path / "self.md").read_text().partition("## Kernels")[2].partition("##")[0]
    assert table.count("\n|") == len(timed) + 2  # header and rule
    steady = rows[-1]["steady"]
    assert ("Unsteady" in (tmp_path / "self.md").read_text()) == (not steady)
    drawn = ElementTree.parse(tmp_path / "self.svg").findall("{*}circle/{*}title")
    assert len(drawn) == len(timed)
    assert script("profiling/figures.py", str(tmp_path / "self.md")).returncode == 2


def test_captured_calls_replay_with_their_values_and_layout(tmp_path: Path) -> None:
    import torch

    from geoalign_kernels.capture import load

    program = (
        "import torch, geoalign_kernels as gk; torch.manual_seed(3)\n"
        "for _ in range(3):\n"
        "    q, k, v = torch.randn(1, 5, 3, 2, 16).unbind(2)\n"
        "    gk.qk_norm_rotary(q, k, v, torch.ones(32), torch.ones(32), None, inplace=True)\n"
    )
    done = script("-c", program, GEOALIGN_CAPTURE=f"qk_norm_rotary_:1:1:{tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "qk_norm_rotary_-00001.safetensors"
    op, args = load(path, "cpu")
    torch.manual_seed(3)
    packed = [torch.randn(1, 5, 3, 2, 16) for _ in range(2)][1]
    assert op == "qk_norm_rotary_" and torch.equal(args[0], packed[:, :, 0])  # the inputs, before the op overwrote them
    assert args[0].stride() == packed[:, :, 0].stride() and args[2] is None
    replayed = script("profiling/replay.py", str(path), "--repeats", "2")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["rel_l2"] == 0.0
    broken = script("-c", program, GEOALIGN_CAPTURE="qk_norm_rotary_:all")
    assert "op:first:last" in broken.stderr
