"""The tables of docs/evaluators.md say what the committed result file says, and that is what the page claims of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("studies")
def test_the_page_is_generated_from_the_result_file() -> None:
    import evaluators

    result = json.loads((ROOT / "docs" / "results" / "evaluators.json").read_text())
    text = (ROOT / "docs" / "evaluators.md").read_text()
    assert text[text.index(evaluators.MARK) :] == evaluators.page(result) + "\n"

    # What must be shown of both evaluators: metres, scale, rest, moving things, noise that is never read as a camera.
    for rows in result["behaviour"].values():
        assert abs(rows["raw render"]["read_over_asked"] - 1) < 0.05
        assert abs(rows["half the motion"]["read_over_asked"] - 0.5) < 0.05
        assert rows["pure rotation"]["read_over_asked"] < 0.05
        assert rows["moving foreground"]["translation_median_m"] < 0.1
        assert rows["noise alone"]["tracked"] < 0.05
