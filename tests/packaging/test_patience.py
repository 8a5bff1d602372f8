"""No test measures the machine: whatever a test waits for, it waits as long as tests/support/patience.py says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from patience import PATIENCE_S
from repository import ROOT
from timed import timed

FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if "campaign" not in path.parts)
A_PAUSE_S = 1
"""Shorter ones are pauses of a loop, or give something room to happen that must not."""
WAITS = ("wait", "join", "communicate", "run", "Barrier")


def short_waits(tree: ast.AST) -> Iterator[int]:
    """Lines with a limit in numbers: ``timeout=5`` of a wait, ``thread.join(5)``, ``monotonic() + 5``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = node.left, node.right
            called = isinstance(left, ast.Call) and ast.unparse(left.func).endswith("monotonic")
            if called and isinstance(right, ast.Constant):
                yield node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in WAITS:
            limits = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            limits += node.args[:1] if ast.unparse(node.func).split(".")[-1] in ("wait", "join") else []
            if any(isinstance(limit, ast.Constant) and (limit.value or 0) >= A_PAUSE_S for limit in limits):
                yield node.lineno


def test_every_wait_is_patient() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in short_waits(ast.parse(path.read_text("utf-8")))
    ]
    assert not found


def test_a_wait_ends_before_its_test(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) > PATIENCE_S


def test_the_list_of_timed_tests_names_those_that_are_there() -> None:
    listed = timed()
    assert len(listed) == len(set(listed)) > 120
    for name in (
        "integration/test_distributed.py::test_a_hung_rank_ends_the_run_with_a_message",
        "unit/rewards/running/test_guard.py::test_a_hung_scorer_times_out_once_and_recovers",
        "unit/cli/test_completion.py::test_every_verb_option_preset_and_setting_is_offered",  # starts by support/
        "profiling/test_replay.py::test_captured_calls_replay_with_their_values_and_layout",  # by a helper beside it
        "profiling/test_bench_ops.py::test_self_check_writes_every_kind_of_row_with_every_field",  # by a fixture above
        "unit/benchmark/tools/test_vipe.py::test_the_camera_is_read",  # by a helper that is imported as a module
        "unit/training/test_parts.py::TestCheckpointWriter",  # in a method
    ):
        assert f"tests/{name}" in listed
    assert all((ROOT / name.split("::")[0]).is_file() for name in listed)


def test_whatever_opens_a_browser_is_timed() -> None:
    """An independent count: every test of that folder, found by its first line."""
    tests = {
        f"{path.relative_to(ROOT)}::{name}"
        for path in (ROOT / "tests" / "browser").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert tests and tests <= set(timed())
