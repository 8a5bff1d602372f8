"""Reports in a real browser: a phone loses nothing, folds open, and the page of a live run loads itself anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from geoalign.report.compare import write_comparison
from geoalign.report.document import document
from geoalign.report.page import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def make_run(folder: Path, gain: float = 1.0) -> Path:
    """A finished run with films, numbers of two noise seeds, curves and troubles, whose camera goes ``gain`` as far."""
    (folder / "eval").mkdir(parents=True)
    c2w = np.tile(np.eye(4), (3, 4, 1, 1))
    c2w[..., 0, 3] = np.arange(4)
    for stage, factor in (("before", 1.4), ("after", gain)):
        read = c2w.copy()
        read[..., 0, 3] *= factor
        video = np.random.default_rng(0).integers(0, 255, (3, 4, 3, 12, 16), np.uint8)
        np.savez(
            folder / "eval" / f"{stage}.npz", names=np.array(["a", "b", "c"]), source=video, generated=video,
            truth=video, target_c2w=c2w, estimated_c2w=read,
        )  # fmt: skip
    names = ("translation_error_m", "rotation_error_deg", "scale_ratio", "translation_gain", "psnr_db")
    levels = {"before": 1.4, "after": gain + 0.1}
    seeds = {stage: {name: [base, base + 0.01] for name in names} for stage, base in levels.items()}
    means = {stage: {name: sum(values) / 2 for name, values in rows.items()} for stage, rows in seeds.items()}
    kinds = ("presets", "random", "mean")
    summary = {"held_out": dict.fromkeys(kinds, means), "held_out_per_noise_seed": dict.fromkeys(kinds, seeds)}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"iteration": i, "reward/trans_m": 1 / (i + 1), "failures/geometry": i, "time/update/forward_s": 1.0,
         "time/scoring_s": 2.0, "time/reward/geometry_s": 2.0, "time/iteration_s": 3.1, "advantage/rot/mean": 0.1 * i}
        for i in range(4)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = f"run: {{name: {'long_name_' * 9}{folder.name}}}\ntrain: {{iterations: {round(4 * gain)}}}\n"
    (folder / "config.yaml").write_text(settings)
    return folder


def cells(tab: Page) -> list[str]:
    return [text.strip() for text in tab.locator("td:visible, .card .change:visible").all_inner_texts()]


CUT_OFF = """[...document.querySelectorAll('main *, header *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + '.' + e.className)"""


def test_a_phone_shows_every_number_of_the_report(open_page: Callable[..., Page], run_folder: Path) -> None:
    path = write_report(run_folder)
    wide = open_page(path)
    phone = open_page(path, width=390, height=800)
    for tab in (wide, phone):
        tab.locator("article.film.live").first.wait_for()
        tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate(CUT_OFF) == []
    assert len(cells(wide)) > 60 and cells(phone) == cells(wide)
    assert phone.locator("article.film.live").count() == 3


def test_a_phone_shows_every_number_of_two_runs(open_page: Callable[..., Page], tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", 1.25)]
    path = write_comparison(runs)
    wide, phone = open_page(path), open_page(path, width=390, height=800)
    for tab in (wide, phone):
        tab.locator("article.film.live").first.wait_for()
        tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate(CUT_OFF) == []
    assert len(cells(wide)) > 60 and cells(phone) == cells(wide)
    # What a table's head says on a wide page stands before every number on a narrow one.
    named = phone.locator("#held-out td[data-label]").first
    before = named.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert before == json.dumps(named.get_attribute("data-label"))
    player = phone.locator("article.film").first
    for name in ("one", "two"):
        player.locator("button.take", has_text=f"long_name_{name}").click()


def test_a_fold_draws_its_film_when_it_is_opened(open_page: Callable[..., Page], run_folder: Path) -> None:
    from playwright.sync_api import expect

    tab = open_page(write_report(run_folder))
    fold = tab.locator("details.fold").first
    assert not fold.locator(".film-view").is_visible()
    fold.locator("summary").first.click()
    fold.locator(".film-view").wait_for()
    expect(fold.locator(".film-said")).to_contain_text("enlarged")
    assert fold.evaluate("f => f.querySelector('.orbit').width") > 200


def test_the_page_of_a_live_run_loads_itself_and_keeps_what_is_open(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    path = tmp_path / "live.html"
    body = "<main><details><summary>more</summary><p id=inside>inside</p></details><h1>{}</h1></main>"
    path.write_text(document("live", body.format("Iteration 1"), refresh_s=1))
    tab = open_page(path)
    tab.locator("summary").click()
    path.write_text(document("live", body.format("Iteration 2"), refresh_s=1))
    expect(tab.locator("h1")).to_have_text("Iteration 2")
    assert tab.locator("#inside").is_visible()
