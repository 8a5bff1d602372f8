"""Whole iterations at reduced depth: their rows and report from a tiny model, their predictions from the cost model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from profiling_runs import SCHEMA, rows_of, script

from geoalign.perf.devices import DEVICES


def test_an_iteration_at_reduced_depth_is_extrapolated_and_its_gradients_agree(tmp_path: Path) -> None:
    """A tiny model of the same kind: every row, and gradients of plain and fused runs, which the script compares."""
    path = tmp_path / "depth.jsonl"
    done = script("profiling/model/bench_depth.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(path)[1:]
    assert all(set(row) == set(SCHEMA.split()) for row in rows)
    timed = {(row["impl"], row["shape"][0]) for row in rows if row["kind"] == "iteration"}
    assert timed == {("off", 1), ("off", 2), ("off", 3), ("line", 4), ("exact", 2), ("int8", 2)}
    times = {row["shape"][0]: row["t_ms_median"] for row in rows if row["kind"] == "iteration" and row["impl"] == "off"}
    (line,) = [row["t_ms_median"] for row in rows if (row["kind"], row["impl"]) == ("iteration", "line")]
    assert line == pytest.approx(times[1] + 3 * (times[2] - times[1]))
    (gradient,) = [row for row in rows if row["name"] == "gradient"]
    assert 0 < gradient["rel_l2"] < 1e-4  # other kernels and batch orders round apart, so not 0
    assert script("profiling/figures.py", str(path)).returncode == 0
    report = path.with_suffix(".md").read_text()
    assert (
        "| ms | off, 1 blocks | off, 2 blocks | off, 3 blocks | off, 4 blocks | exact, 2 blocks | int8, 2 blocks |"
        in report
    )
    assert report.count("the line through 1 and 2 blocks") == 3 and "with off" in report


@pytest.mark.usefixtures("profiling")
def test_an_int8_row_is_never_an_exact_run(tmp_path: Path) -> None:
    """Where int8 does not pay beside the core a trainer has no twin, and the row says why it was not run."""
    from types import SimpleNamespace

    import bench_depth
    import bench_ops
    import torch

    bench = bench_ops.Bench(torch.device("cpu"), tmp_path / "r.jsonl", quick=True, small=True)
    execution = SimpleNamespace(core="sdpa_cudnn")
    trainer = SimpleNamespace(policy=SimpleNamespace(fast=None, model=SimpleNamespace(execution=execution)))
    scene = SimpleNamespace(config=bench_depth.paper(), trainer=lambda *_, **__: trainer)
    bench_depth.iteration(bench, scene, 2, "int8")  # type: ignore[arg-type]
    (row,) = rows_of(tmp_path / "r.jsonl")[1:]
    assert (row["impl"], row["status"]) == ("int8", "not run") and "sdpa_cudnn" in row["note"]


@pytest.mark.usefixtures("profiling")
def test_one_iteration_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an unknown card at the price of the slowest known one; none where not even the smallest fits."""
    import bench_depth
    import bench_ops
    import torch
    from deadline import Deadline

    bench = bench_ops.Bench(torch.device("cpu"), None, quick=True, small=True)
    bench.small = False
    run: list[Any] = []
    monkeypatch.setattr(bench_ops.Bench, "ceilings", lambda *_: None)
    monkeypatch.setattr(bench_depth, "iteration", lambda *arguments: run.append(arguments[-1]))
    scene = bench_depth.Scene(bench_depth.paper(), None, bench.device, (1, 2, 4), 2)  # type: ignore[arg-type]
    prices = [bench_depth.price_s(scene.config, 2, size, DEVICES["a800"]) for size in bench_depth.SIZES]
    assert prices == sorted(prices, reverse=True)
    for price in prices:
        bench.deadline = Deadline(price + bench_ops.CEILINGS_S + 0.1, lambda: 0.0)
        bench_depth.one(bench, scene)
    assert run == list(bench_depth.SIZES)
    bench.deadline = Deadline(prices[-1], lambda: 0.0)
    bench_depth.one(bench, scene)
    assert len(run) == len(prices) and "out of time" in bench.rows[-1]["note"]


@pytest.mark.usefixtures("profiling")
def test_predicted_iterations_at_reduced_depth() -> None:
    """Seconds on an H200 that the specification of the benchmark gives for 2, 4 and 8 blocks."""
    import bench_depth

    config = bench_depth.paper()
    for core, expected in (("flash3", (26, 48, 92)), ("sdpa_flash", (36, 68, 132))):
        profile = DEVICES["h200"].with_core(core)
        found = [sum(bench_depth.predicted_ms(config, n, "off", profile).values()) / 1e3 for n in (2, 4, 8)]
        assert found == pytest.approx(expected, abs=0.5)
