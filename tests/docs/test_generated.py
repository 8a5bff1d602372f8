"""Tables of the docs that are made from stored results and from the cost model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("studies")
@pytest.mark.parametrize(
    ("name", "page", "word"),
    [
        ("foreign_kernels", "kernels.md", "SageAttention 1"),
        ("budgets", "profiling.md", "eager, nothing shared"),
        ("budgets", "benchmark.md", "GPU hours of sampling"),
        ("dropin", "drop-in.md", "267 of 300"),
        ("decode", "engine.md", "diffusers' decoder"),
    ],
)
def test_generated_tables_are_up_to_date(name: str, page: str, word: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert import_module(name).page(text) == text, f"run profiling/studies/{name}.py --write docs/{page}"
    assert word in text
