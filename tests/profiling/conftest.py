"""Makes `profiling_runs` importable from the tests of this folder, and the scripts where a test uses `profiling`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from profiling_runs import ROOT, script


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "self.jsonl"
    done = script("profiling/ops/bench_ops.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture
def profiling(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("profiling", "profiling/model", "profiling/ops"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
