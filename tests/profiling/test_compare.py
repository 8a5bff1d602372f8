"""When a row counts as a regression against earlier runs."""

from __future__ import annotations

from typing import Any

import pytest
from profiling_runs import kernel_row


@pytest.mark.usefixtures("profiling")
def test_a_regression_needs_both_bounds_and_a_steady_past() -> None:
    import compare

    def run(number: int, *rows: dict[str, Any], steady: bool = True) -> list[dict[str, Any]]:
        machine = {"device": "X", "versions": {"torch": "1"}, "cuda": "13", "steady": steady, "run_id": f"{number:02d}"}
        return [machine, *rows]

    long, short = (lambda ms: kernel_row("a", "ours", ms)), (lambda ms: kernel_row("b", "ours", ms))
    past = [run(i, long(2.0), short(0.01)) for i in range(6)]
    assert compare.regressions(run(9, long(2.09), short(0.02)), past) == []  # +4.5 %; +0.01 ms
    (found,) = compare.regressions(run(9, long(2.11), short(0.011)), past)
    assert found.startswith("a ours") and "last 5 runs" in found
    # the last five runs count, unsteady ones do not, and another shape is another cohort
    newer = [run(i, long(4.0)) for i in range(10, 15)]
    assert compare.regressions(run(20, long(4.1)), [*newer, *past]) == []
    assert compare.regressions(run(20, long(4.1)), [*past, run(30, long(9.0), steady=False)])
    assert compare.regressions(run(9, kernel_row("a", "ours", 9.0, shape=[7])), past) == []
    # a run that has stages is judged stage by stage: one that was cut short does not take the others with it
    of = [long(9.0) | {"stage": "attention", "steady": True}, short(9.0) | {"stage": "rewards", "steady": None}]
    (found,) = compare.regressions(run(9, *of, steady=False), past)
    assert found.startswith("a ours")
    assert len(compare.cohorts(run(9, *of, steady=True))) == 1
