"""No test measures the machine: whatever a test waits for, it waits as long as tests/support/patience.py says.

What a program of the project waits for is bounded too, and its limits are met by a machine that is ten times slower.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import HANG_S, LONG_S, PATIENCE_S
from repository import ROOT
from timed import timed

TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.stem not in ("patience", "test_patience"))
PRODUCT = sorted(path for part in ("geoalign", "kernels/geoalign_kernels") for path in (ROOT / part).rglob("*.py"))
A_PAUSE_S = 1
"""Shorter ones are pauses of a loop, give something room to happen that must not, or run out on purpose."""
ENOUGH_S = 600
"""What is written as a number is at least this: settings of a run, stand-ins that hang for ever."""
ANSWERS_S = 100
"""The least that the project itself waits for another program: of one that answers within ten seconds elsewhere."""
LIMITS = re.compile(r"(^|_)(timeout|timeout_s)$|(^|_)(TIMEOUT|GONE|WAIT|PATIENCE|ANSWER|LAST_BREATH|SECONDS)(_S)?$")
IN_TEXT = re.compile(r"timeout_s=(\d+\.?\d*)|\bsleep\((\d+\.?\d*)\)")


def limits(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """Lines with a limit in numbers, and the limit in seconds.

    ``timeout=5`` and ``timeout_s=5`` of a call, a setting or a dictionary, ``thread.join(5)``, ``monotonic() + 5``,
    ``SOME_TIMEOUT_S = 5``, ``def f(timeout_s=5)``, sleeps of stand-ins, and a browser's.
    """
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        match node:
            case ast.BinOp(left=ast.Call() as left, op=ast.Add(), right=right):
                found += [right] if ast.unparse(left.func).endswith("monotonic") else []
            case ast.Call():
                found += [keyword.value for keyword in node.keywords if keyword.arg and LIMITS.search(keyword.arg)]
                called = ast.unparse(node.func).split(".")[-1]
                found += node.args[:1] if called in ("wait", "join", "timeout", "sleep") else []
                if called == "set_default_timeout" and isinstance(node.args[0], ast.Constant):
                    yield node.lineno, node.args[0].value / 1e3
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                found += [node.value] if LIMITS.search(name) else []
            case ast.Dict():
                keys = [key.value if isinstance(key, ast.Constant) else "" for key in node.keys]
                found += [v for k, v in zip(keys, node.values, strict=True) if LIMITS.search(str(k))]
            case ast.FunctionDef(args=args):
                placed = [*args.posonlyargs, *args.args]
                named = [*placed[len(placed) - len(args.defaults) :], *args.kwonlyargs]
                given = zip(named, [*args.defaults, *args.kw_defaults], strict=True)
                found += [value for name, value in given if LIMITS.search(name.arg)]
            case ast.Constant(value=str() as text):
                for words in IN_TEXT.finditer(text):
                    yield node.lineno, float(words[1] or words[2])
        for limit in found:
            if isinstance(limit, ast.Constant) and isinstance(limit.value, int | float):
                yield node.lineno, float(limit.value)


def short(paths: list[Path], enough_s: float) -> list[str]:
    """Places of limits that are neither pauses nor enough."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {limit:g} s"
        for path in paths
        for line, limit in limits(ast.parse(path.read_text("utf-8")))
        if A_PAUSE_S < limit < enough_s
    ]


def test_every_wait_is_patient() -> None:
    assert not short(TESTS, ENOUGH_S)


def test_the_project_waits_long_for_other_programs() -> None:
    assert not short(PRODUCT, ANSWERS_S)


@pytest.mark.parametrize(
    "code",
    ["process.wait(5)", "run(command, timeout=5)", "thread.join(5.0)", "late = time.monotonic() + 5", "timeout(5)",
     "tab.set_default_timeout(5_000)", "Guarded(timeout_s=5)", "def until(true, timeout_s: float = 5.0): ...",
     "_LAST_BREATH_S = 5.0", "worker = {'timeout_s': 5}", "'train.rank_timeout_s=5'", "f'train.rank_timeout_s=5{x}'",
     "'import time; time.sleep(5)'", "MAX_WAIT: float = 5"],
)  # fmt: skip
def test_limits_are_seen_wherever_they_are_written(code: str) -> None:
    assert [limit for _, limit in limits(ast.parse(code))] == [5.0]


def test_a_wait_ends_before_its_test(pytestconfig: pytest.Config) -> None:
    assert ENOUGH_S <= PATIENCE_S < float(pytestconfig.getini("timeout")) < LONG_S
    assert HANG_S < PATIENCE_S


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
