"""Damaged inputs over every reader: a right result or one clear error, never a traceback, a hang or a full memory.

Runs in this process: a crash of the native decoder would take the test run down and so cannot pass unseen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import CASES, classify, damaged_inputs
from patience import PATIENCE_S, READ_CPU_S
from repository import ROOT

EACH, SLOW = 10, 1600
"""Damaged files of each reader in ``make test``, of all together in ``make slow``."""


def test_the_page_tells_what_is_tried() -> None:
    told = " ".join((ROOT / "docs" / "data.md").read_text("utf-8").split())
    assert EACH == 10 and f"`make test` reads ten for each of {len(CASES)} readers, `make slow` {SLOW:,} in all" in told
    limits = f"more than {READ_CPU_S:.0f} seconds of computing, {PATIENCE_S / 60:.0f} minutes of waiting"
    assert f"A file that takes {limits}" in told


@pytest.mark.parametrize("count", [EACH * len(CASES), pytest.param(SLOW, marks=pytest.mark.slow)])
def test_damaged_files_end_in_an_answer_or_one_clear_error(count: int, tmp_path: Path) -> None:
    outcomes: dict[str, list[str]] = {}
    for reader, description, call in damaged_inputs(6, count, tmp_path):
        outcome, said = classify(call)
        outcomes.setdefault(outcome, []).append(f"{reader}, {description}: {said}")
        assert outcome != "clear_error" or said
    assert outcomes.keys() == {"clear_error", "accepted_rightly"}, outcomes | {
        "clear_error": [],
        "accepted_rightly": [],
    }
    assert len(outcomes["clear_error"]) > count // 2  # the damage is real


def test_equal_seeds_give_equal_damage(tmp_path: Path) -> None:
    first, again, other = (
        [(item.reader, item.description) for item in damaged_inputs(seed, 44, tmp_path / str(number))]
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == again != other
