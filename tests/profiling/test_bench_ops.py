"""The benchmark of the ops: end to end on the CPU, which rows are gated, which not run, what is said of registers."""

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
def test_every_exact_core_is_gated_and_fp8_is_not_run_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_attention
    import bench_products
    import torch

    q = torch.zeros(1, 4, 1, 8)
    gated = bench_attention.AttentionCase(4, 4, [(q, q, q)]).gated
    assert gated == {"sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4", "triton"}
    device, dtype = torch.device("cpu"), torch.float32
    cases = {case.variant: case for case in bench_products.product_cases(8, 16, 16, device, dtype)}
    assert cases["gelu"].gated == {"torch", "compiled", "cublaslt"} and cases["fp8"].absent("torch") == ""

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.9" in bench_products.why_not_fp8_product(torch.device("cuda"))
    monkeypatch.setattr(bench_products, "why_not_fp8_product", lambda device: "too old")
    *_, fp8 = bench_products.product_cases(8, 16, 16, device, dtype)
    assert [fp8.absent(impl) for impl, _ in fp8.rows] == ["too old"] * 2


@pytest.mark.usefixtures("profiling")
def test_registers_are_those_of_this_compiler_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked-in table is of one Triton; a machine with another one has other registers."""
    import json

    import bench_ops
    import torch

    table = json.loads(bench_ops.EXPECTATIONS.read_text())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, known in ((table["triton"], True), ("3.0.0", False)):
        environment = {"device": "X", "commit": "", "versions": {"triton": version}}
        monkeypatch.setattr(bench_ops, "environment", lambda *_, row=environment: row)
        bench = bench_ops.Bench(torch.device("cpu"), None, quick=True, small=True)
        bench.device = torch.device("cuda")
        assert bool(bench.static_numbers("attention", "fwd", "triton")) == known
