"""docs/configuration.md is what the settings say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geoalign.config.docs import reference_page
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.config.source import preset_names, preset_summary

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference_page(Config), "run `make docs` and commit docs/configuration.md"


@pytest.mark.parametrize("preset", preset_names())
def test_what_a_preset_says_of_itself_fits_into_a_cell(preset: str) -> None:
    """The comment at its top becomes one line of a table: a command of several lines could not be pasted from there."""
    head = re.match(r"(#.*\n)+", (ROOT / "configs" / f"{preset}.yaml").read_text(encoding="utf-8"))
    assert head is not None and not re.search(r"^# {2,}|\\$", head[0], re.MULTILINE)
    outside_code = re.sub(r"`[^`]+`", "", preset_summary(preset))
    assert outside_code and " --" not in outside_code and "\\" not in outside_code


def test_the_fast_preset_is_what_the_first_command_of_the_fidelity_page_measures() -> None:
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r'--setting "(.+)"', page)
    measured = load_config(Config, "paper_64xa800", settings.split())
    assert measured.approximations() == load_config(Config, "paper_64xa800_fast").approximations() != {}
