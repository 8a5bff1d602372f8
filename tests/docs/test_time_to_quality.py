"""The tables of time to quality and of the rungs, from made-up curves whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("studies")


def write(file: Path, *points: tuple[float, float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"points": points, "iterations": 10}))


def cells(table: str, row: str) -> list[str]:
    found = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_first_crossing_counts_linear_between_evaluations() -> None:
    import time_to_quality as study

    assert study.reached([(0, 1.0), (10, 0.98), (20, 0.92), (30, 0.99)]) == pytest.approx(15)  # 0.95 is half way
    assert study.reached([(0, 1.0), (10, 0.96)]) != study.reached([(0, 1.0), (10, 0.96)])  # never


def test_factors_are_of_equal_seeds_and_a_goal_not_reached_is_a_bound(tmp_path: Path) -> None:
    import time_to_quality as study

    first, plain, exact, fast, _ = study.ARMS
    for seed, slow in ((1, 40.0), (2, 60.0)):
        write(tmp_path / study.file_of(first, seed), (0, 1.0), (100 * seed, 0.95))
        write(tmp_path / study.file_of(plain, seed), (0, 1.0), (slow, 0.95), (80, 0.9))
        write(tmp_path / study.file_of(exact, seed), (0, 1.0), (20, 0.95))
    write(tmp_path / study.file_of(fast, 1), (0, 1.0), (10, 0.96))
    table = study.table(tmp_path)
    assert cells(table, exact) == [
        exact, "2.00", "20.0, 20.0", "0.950 (0.950 to 0.950)", "7.50 (5.00 to 10.00)", "2.50 (2.00 to 3.00)",
    ]  # fmt: skip
    assert cells(table, plain)[-2:] == ["2.92 (2.50 to 3.33)", ""]
    assert cells(table, fast)[2] == "not reached" and cells(table, fast)[-1] == "not reached"
    write(tmp_path / study.file_of(plain, 2), (0, 1.0), (80, 0.97))  # at least 80 / 20
    assert cells(study.table(tmp_path), exact)[-1] == "at least 3.00 (2.00 to 4.00)"


def test_a_rung_stands_beside_the_exact_run_of_its_seed(tmp_path: Path) -> None:
    import rungs
    import time_to_quality as study

    name = next(iter(rungs.CHANGED))
    for seed, end in ((1, 0.8), (2, 0.6)):
        write(tmp_path / study.file_of(rungs.EXACT, seed), (0, 1.0), (30, end))
    write(tmp_path / rungs.file_of(name, 2), (0, 1.0), (15, 0.7))
    table = rungs.table(tmp_path)
    assert cells(table, "exact levers")[1:4] == ["3.00", "0.700 (0.600 to 0.800)", "-30 % (-40 to -20)"]
    assert cells(table, name)[1:] == [
        "1.50",
        "0.700 (0.700 to 0.700)",
        "-30 % (-30 to -30)",
        "+0.100 (+0.100 to +0.100)",
    ]
    assert cells(table, "control: a tail of one step")[1] == "not run"
