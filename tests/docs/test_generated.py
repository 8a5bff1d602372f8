"""Tables of the docs that are made from stored results and from the cost model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def study(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"profiling/studies/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "page", "word"),
    [
        ("foreign_kernels", "kernels.md", "SageAttention 1"),
        ("budgets", "profiling.md", "eager, nothing shared"),
        ("decode", "engine.md", "diffusers' decoder"),
    ],
)
def test_generated_tables_are_up_to_date(name: str, page: str, word: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert study(name).page(text) == text, f"run profiling/studies/{name}.py --write docs/{page}"
    assert word in text
