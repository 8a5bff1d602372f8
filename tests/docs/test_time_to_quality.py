"""The tables of time to quality and of the rungs, from made-up curves whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoalign.config.load import load_config
from geoalign.config.schema import Config

pytestmark = pytest.mark.usefixtures("studies")


def write(file: Path, *points: tuple[float, float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"points": points, "iterations": 10, "device": "a CPU", "cores": 2, "commit": "abc"}))


def cells(table: str, row: str) -> list[str]:
    found = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_first_crossing_counts_linear_between_evaluations() -> None:
    import time_to_quality_tables as tables

    assert tables.reached([(0, 1.0), (10, 0.98), (20, 0.92), (30, 0.99)]) == pytest.approx(15)  # 0.95 is half way
    assert tables.reached([(0, 1.0), (10, 0.96)]) != tables.reached([(0, 1.0), (10, 0.96)])  # never


def test_factors_are_of_equal_seeds_and_a_goal_not_reached_is_a_bound(tmp_path: Path) -> None:
    """Iterations come from the curves, seconds from the pace; a factor holds both."""
    import pace
    import time_to_quality as study
    import time_to_quality_tables as tables

    first, plain, exact, fast, _ = study.ARMS
    for seed, slow in ((1, 20), (2, 30)):
        write(tmp_path / study.file_of(first, seed), (0, 1.0), (20 * seed, 0.95))
        write(tmp_path / study.file_of(plain, seed), (0, 1.0), (slow, 0.95), (40, 0.9))
        write(tmp_path / study.file_of(exact, seed), (0, 1.0), (10, 0.95))
    write(tmp_path / study.file_of(fast, 1), (0, 1.0), (10, 0.96))
    assert cells(tables.table(tmp_path), exact)[1:4] == ["not run", "10, 10", "not reached"]  # no pace: no seconds
    rows = [
        {"levers": arm, "cpu_s_mean": each} for arm, each in ((first, 5.0), (plain, 2.0), (exact, 1.0), (fast, 0.5))
    ]
    (tmp_path / pace.RESULT).write_text(json.dumps({"settings": rows, "environment": {"commit": "def"}}))
    assert cells(tables.table(tmp_path), exact)[1:] == [
        "1.00", "10, 10", "10 (10 to 10)", "0.950 (0.950 to 0.950)", "15.00 (10.00 to 20.00)", "5.00 (4.00 to 6.00)",
    ]  # fmt: skip
    assert cells(tables.table(tmp_path), plain)[-2:] == ["2.92 (2.50 to 3.33)", ""]
    assert cells(tables.table(tmp_path), fast)[2:4] == ["not reached", "not reached"]
    assert cells(tables.table(tmp_path), fast)[-1] == "not reached"
    assert "Ended once" not in tables.table(tmp_path)
    short = json.loads((tmp_path / study.file_of(first, 1)).read_text()) | {"iterations": 5}
    (tmp_path / study.file_of(first, 1)).write_text(json.dumps(short))
    told = f"the error at the end is of then: *{first}* after 5 of 10 iterations."
    assert tables.table(tmp_path).endswith(f"{told} a CPU, 2 cores; commit abc, timed at def.")
    write(tmp_path / study.file_of(plain, 2), (0, 1.0), (40, 0.97))  # at least 40 x 2 / 10 x 1
    assert cells(tables.table(tmp_path), exact)[-1] == "at least 6.00 (4.00 to 8.00)"


def test_a_rung_stands_beside_the_exact_run_of_its_seed(tmp_path: Path) -> None:
    import rungs
    import time_to_quality as study

    name = next(iter(rungs.CHANGED))
    for seed, end in ((1, 0.8), (2, 0.6)):
        write(tmp_path / study.file_of(rungs.EXACT, seed), (0, 1.0), (60, end), (120, end / 2))
    write(tmp_path / rungs.file_of(name, 2), (0, 1.0), (15, 0.7))
    table = rungs.table(tmp_path)
    assert cells(table, "exact levers")[1:3] == ["0.700 (0.600 to 0.800)", "-30 % (-40 to -20)"]
    assert cells(table, name)[1:] == [
        "0.700 (0.700 to 0.700)",
        "-30 % (-30 to -30)",
        "+0.100 (+0.100 to +0.100)",
    ]
    assert cells(table, "control: a tail of one step")[1] == "not run"
    assert table.endswith("emulated on a CPU. a CPU, 2 cores; commit abc.")


def test_the_fast_arm_is_the_fast_preset_as_far_as_a_cpu_profits() -> None:
    """int8 is emulated here and this world has no HPSv3; all else, audits included, is the preset's."""
    import pace
    import time_to_quality as study
    from record import WHOLE

    preset = load_config(Config, "paper_64xa800_fast")
    *_, fast = (load_config(Config, study.CONFIG, study.overrides(arm, 1, WHOLE)) for arm in study.ARMS)
    gpu_only = {"ode.attention", "ode.int8_threshold", "rewards.hpsv3.options.frame_stride"}
    assert fast.changes() == {name: value for name, value in preset.changes().items() if name not in gpu_only}
    assert fast.ode.audit_every == preset.ode.audit_every == pace.PERIOD  # as many timed iterations hold one audit
    assert fast.window.interval == preset.window.interval
