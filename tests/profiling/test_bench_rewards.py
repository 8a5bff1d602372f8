"""The benchmark of the reward models without a GPU: its plan with exact sizes, and its rows at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from profiling_runs import script

from geoalign.perf.devices import DEVICES


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def qwen2_vl(width: int, keys: int, hidden: int, *, rows: int) -> int:
    """Parameters of Qwen2-VL without its language head: 32 vision blocks of width 1280, 28 text blocks."""
    vision_block = 4 * 1280 + linear(1280, 3840) + linear(1280, 1280) + linear(1280, 5120) + linear(5120, 1280)
    merger = 2 * 1280 + linear(5120, 5120) + linear(5120, width)
    attention = linear(width, width) + 2 * linear(width, keys) + width * width
    text_block = attention + 3 * width * hidden + 2 * width
    return 1176 * 1280 + 32 * vision_block + merger + rows * width + 28 * text_block + width


def test_plan_prints_exact_sizes_and_predictions() -> None:
    done = script("profiling/model/bench_rewards.py", "--plan")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    sizes = {row[0]: int(next(cell for cell in row[9:] if "," in cell).replace(",", "")) for row in rows}
    # MapAnything: totals of the published code (tests/golden). The others by hand from the published configurations.
    assert sizes["mapanything_v1.1"] == 1_142_996_536 and sizes["mapanything_v1"] == 481_028_408
    assert sizes["videoalign"] == qwen2_vl(1536, 256, 8960, rows=151_660) + 1536
    head = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2
    assert sizes["hpsv3"] == qwen2_vl(3584, 512, 18944, rows=151_658) + head
    # 348 TFLOP at the assumed rates of the profiles, printed before anything is measured
    (full,) = [row for row in rows if row[:4] == ["mapanything_v1.1", "1", "x", "81"]]
    expected = [1e3 * float(full[11]) * 1e12 / device.reward for device in DEVICES.values()]
    assert [float(cell) for cell in full[12:]] == pytest.approx(expected, rel=1e-3)


def test_self_check_times_every_body_and_compares_it_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    done = script("profiling/model/bench_rewards.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["kind"] == "environment" and rows[1]["kind"] == "ceiling" and rows[-1]["impl"] == "last"
    models = [row for row in rows if row["kind"] == "reward"]
    timed = {(row["name"], row["impl"]) for row in models}
    bodies = {(name, impl) for name in ("mapanything_v1.1", "videoalign", "hpsv3") for impl in ("eager", "graph")}
    assert timed == bodies | {("weights_take_turns", "arena")}
    for row in models:
        assert row["status"] == "ok" and row["bitwise_equal"] is True and row["t_ms_p20"] <= row["t_ms_p80"], row
        assert row["graph"] is False  # a CPU captures nothing, and the row says so
    assert all(row["finite"] and row["parameters"] > 0 for row in models if row["impl"] != "arena")

    report = script("profiling/figures.py", str(path), "--out", str(tmp_path))
    assert report.returncode == 0, report.stderr
    table = (tmp_path / "rewards.md").read_text().partition("## Reward models")[2].partition("##")[0]
    assert table.count("\n|") == len(models) + 2 and "**no**" not in table
