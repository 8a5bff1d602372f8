"""Makes the scripts of `profiling/studies`, which write pages, importable where a test uses `studies`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "profiling" / "studies"))
