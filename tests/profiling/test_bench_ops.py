"""The benchmark of the ops end to end on the CPU, and its length on a GPU as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from profiling_runs import SCHEMA, rows_of


def test_self_check_writes_every_kind_of_row_with_every_field(results: Path) -> None:
    first, *rows = rows_of(results)
    assert first["kind"] == "environment" and isinstance(first["steady"], bool)
    assert {"versions", "commit", "dirty", "command", "clocks_before", "clocks_after", "cuda"} <= set(first)
    assert all(set(row) == set(SCHEMA.split()) for row in rows)
    assert {row["kind"] for row in rows} == {"ceiling", "kernel"}
    assert [row["impl"] for row in rows if row["name"] == "copy"] == ["first", "last"]
    assert rows[0]["name"] == "copy" and rows[-1]["name"] == "matmul"
    kernels = [row for row in rows if row["kind"] == "kernel"]
    # float32 results against float64: far below the gate, so a wrong formula cannot hide behind it
    exact = {"qk_norm_rotary", "rms_norm", "unrotate_gate_norm", "modulated_norm", "gated_residual", "flow_log_prob"}
    for name in exact:
        for direction in ("fwd", "bwd"):
            for impl in ("ours", "eager", "compiled"):
                found = [r for r in kernels if (r["name"], r["direction"], r["impl"]) == (name, direction, impl)]
                assert found and all(r["status"] == "ok" and r["rel_l2"] <= 1e-5 for r in found), (name, found)
    both = {row["variant"] for row in kernels if row["name"] in ("unrotate_gate_norm", "modulated_norm")}
    assert both == {"", "float32 stream"}
    products = {(row["variant"], row["impl"]): row for row in kernels if row["name"] == "ffn_product"}
    assert {variant for variant, _ in products} == {"plain", "gelu", "int8", "fp8"}
    assert products["gelu", "cublaslt"]["rel_l2"] <= 1e-3  # the library's tanh is its own
    assert 1e-3 < products["int8", "torch"]["rel_l2"] < 2e-2 < products["fp8", "torch"]["rel_l2"] < 6e-2
    modes = {row["impl"]: row["rel_l2"] for row in kernels if row["name"] == "attention" and row["direction"] == "fwd"}
    assert modes["sdpa_flash"] <= 1e-5 < modes["int8"] < modes["int8_fp8"] < 0.1
    levels = {(row["impl"], row["variant"]): row["level"] for row in kernels}
    assert levels["ours", ""] == levels["compiled", ""] == "rounding" and levels["eager", ""] == "lossless"
    assert levels["int8", ""] == levels["sage", ""] == levels["torch", "int8"] == "changing"
    assert None not in levels.values() and {row["version"] for row in kernels if row["impl"] == "compiled"} == {
        first["versions"]["torch"]
    }
    absent = {row["impl"] for row in kernels if row["status"] == "not run"}
    assert {"sage", "flashinfer", "sglang", "sgl_kernel", "liger", "flash3", "flash4"} <= absent
    assert "sdpa_cudnn" in absent and all(row["note"] for row in kernels if row["status"] == "not run")


@pytest.mark.usefixtures("profiling")
def test_quick_run_is_predicted_to_take_less_than_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At production shapes, on fake tensors of an H200; what is not predicted is cut off by the run's own clock."""
    import bench_cases
    import bench_ops
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(bench_cases, "buffers_for", lambda size, device: 3)
    bench = object.__new__(bench_ops.Bench)
    bench.device, bench.small, bench.quick = torch.device("cuda"), False, True
    bench.repeats, bench.dtype, bench.profile = 30, torch.bfloat16, bench_ops.DEVICES["h200"]
    minutes, timed = bench_ops.estimate(bench, "")
    assert 0.1 < timed < minutes < 10.0 and bench_ops.QUICK_S < 600.0
    assert bench_ops.estimate(bench, "rms_norm")[0] < minutes / 5
    bench.quick = False
    assert bench_ops.estimate(bench, "")[0] > minutes
