"""Tables of the benchmark's report in a real browser: a number shows the cases behind it, a case its row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fixed_results import fixed_results

from geoalign.benchmark.report import worst_cases
from geoalign.benchmark.report_tables import SCRIPT, LinkedTables
from geoalign.benchmark.table import Results, all_tables
from geoalign.report.document import document

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def test_a_number_shows_its_cases_the_worst_first_and_each_leads_on(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    results = Results.read(fixed_results(tmp_path / "results"))
    linked = LinkedTables(results, worst_cases(results))
    tables = "".join(map(linked.html, all_tables(results)))
    page = open_page(
        document("tables", f"<main>{tables}{linked.behind()}{linked.case_list(0)}</main>", scripts=[SCRIPT])
    )
    assert page.locator("#behind").is_hidden() and page.locator("#case-bear_camera_1_speed_1").is_hidden()
    position = page.locator("#table1 + .scroll tbody tr", has_text="base").locator("td a").nth(2)
    position.click()
    lines = page.locator("#behind li")
    assert page.locator("#behind h3").inner_text().endswith("base, position, m \N{DOWNWARDS ARROW}")
    assert page.locator("#behind p").inner_text() == "12 cases, the worst first." and lines.count() == 12
    assert lines.nth(0).inner_text() == "swan_camera_5_speed_2 timed out after 1800 s"
    assert lines.nth(1).locator("a").nth(1).get_attribute("href") == "videos/base/swan.mp4"
    lines.nth(1).locator("a").nth(0).click()
    row = page.locator("#case-swan_camera_1_speed_2")
    assert row.is_visible() and "1.68" in row.inner_text()  # 4 x (2 x 0.2 + 0.02): its fold is open
    page.locator("#failures + .scroll tbody tr", has_text="vipe: base").locator("td a").nth(1).click()
    assert lines.count() == 1 and page.locator("#behind p").inner_text() == "1 case, the worst first."
