"""The table of docs/learning.md and its provenance are those of the committed result files."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("studies")
def test_the_page_is_generated_from_the_result_files(tmp_path: Path) -> None:
    import learning

    committed = ROOT / "docs" / "learning.md"
    page = tmp_path / "learning.md"
    page.write_text(committed.read_text().split(learning.MARK)[0])
    learning.write_table(ROOT / "docs" / "results" / "learning", page)
    assert page.read_text() == committed.read_text()
