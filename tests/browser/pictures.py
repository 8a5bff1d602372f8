"""The pictures of docs/images that show reports, taken in Chromium: ``python tests/browser/pictures.py [RUN ...]``.

RUN are run folders, the first a finished one; with a second one the comparison is taken too, and with ``--live RUN``
(started beside this) the report of a run under way. ``--video V`` takes the page on which a path is drawn. What is
written lies in docs/images; look at it before it is committed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.draw_path import write_path_page
from geoalign.report.compare import write_comparison
from geoalign.report.page import write_report

sys.path.append(str(Path(__file__).parents[1] / "support"))  # where pytest finds it
from chromium import binary

IMAGES = Path(__file__).parents[2] / "docs" / "images"
FILM = "const p = document.querySelector('article.film').player; if (p.selects.lines) p.show({lines: 'asked'});"
DRAWN = """for (const [id, value, kind] of [["preset", "arc_right", "change"], ["strength", "10", "input"]]) {
  const field = document.getElementById(id); field.value = value; field.dispatchEvent(new Event(kind)); }"""


def take(browser: Browser, page: Path, name: str, width: int, height: int, script: str = "", at: str = "") -> None:
    """Save the first ``height`` pixels of ``page``, or of its part ``at``, as docs/images/NAME.png in 256 colours."""
    from PIL import Image

    tab = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1.5 if width < 500 else 1)
    tab.set_default_timeout(600_000)  # of a machine with much else to do
    tab.goto(page.resolve().as_uri())
    tab.locator("article.film.live").first.wait_for()
    if script:
        tab.evaluate(script)
    if at:
        tab.locator(at).first.evaluate("e => e.scrollIntoView()")
    tab.wait_for_timeout(2000)  # what follows the film's start is drawn
    path = IMAGES / f"{name}.png"
    tab.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(path, path.stat().st_size)


def main() -> None:
    """Take all pictures that the arguments allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--live", type=Path)
    parser.add_argument("--video", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary(), args=["--no-sandbox"])
        if args.runs:
            page = write_report(args.runs[0], Path(folder) / "report.html")
            take(browser, page, "report", 1180, 1500)
            take(browser, page, "report_film", 1180, 1120, FILM, "#samples")
            take(browser, page, "report_phone", 390, 1400, FILM, "article.film")
        if len(args.runs) > 1:
            take(browser, write_comparison(args.runs, Path(folder) / "two.html"), "report_two", 1180, 1500)
        if args.live:
            take(browser, write_report(args.live, Path(folder) / "live.html"), "report_live", 1180, 900)
        if args.video:
            law = load_config(Config, "tiny_cpu").data.trajectories.rescale  # that of the world's clips
            take(browser, write_path_page(args.video, Path(folder) / "path.html", law), "path", 1180, 1500, DRAWN)
        browser.close()


if __name__ == "__main__":
    main()
