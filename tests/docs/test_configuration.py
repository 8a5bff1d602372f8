"""docs/configuration.md is what the settings say of themselves."""

from __future__ import annotations

from pathlib import Path

from geoalign.config.docs import reference_page
from geoalign.config.schema import Config

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference_page(Config), "run `make docs` and commit docs/configuration.md"
