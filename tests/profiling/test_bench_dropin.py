"""The benchmark of the drop-in at a tiny size on the CPU: counts, outputs that it compared, every field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from profiling_runs import script


def test_a_quick_run_compares_outputs_and_counts_forwards(tmp_path: Path) -> None:
    path = tmp_path / "dropin.json"
    done = script(
        "profiling/model/bench_dropin.py", "--json", str(path), "--device", "cpu", "--quick", "--repeats", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert {"versions", "commit", "device"} <= set(result["environment"])
    rows = {(row["start"], row["variant"]): row for row in result["rows"]}
    assert rows.keys() == {(s, v) for s in (1, 5) for v in ("stock", "group", "group+accelerate")}
    for (start, variant), row in rows.items():
        assert row["forwards"] == (24 if variant == "stock" else {1: 20, 5: 12}[start])
        assert row["speedup"] == pytest.approx(row["share_of_counted"] * row["counted_speedup"])
        if variant != "stock":
            assert row["replay_max_diff"] == 0.0 and row["final_rel_l2"] < 1e-5 and row["log_prob_max_diff"] < 1e-3


@pytest.mark.usefixtures("profiling")
def test_counted_forwards_of_the_real_run() -> None:
    import bench_dropin

    for plan in (bench_dropin.CPU, bench_dropin.GPU):
        assert [plan.forwards(start, "group") for start in plan.starts] == [267, 179, 91]
        assert plan.forwards(2, "stock") == 300
