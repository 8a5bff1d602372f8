"""A Chromium of the machine, one for all tests; a page that fails the test when it asks for anything outside itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import binary
from patience import PATIENCE_S

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Opener = Callable[..., "Page"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_S * 1e3)  # its own, of which a page's knows nothing
    with sync_playwright() as playwright:
        # The sandbox of Chromium needs rights that containers and root do not have; the pages are our own.
        browser = playwright.chromium.launch(executable_path=binary(), args=["--no-sandbox"], timeout=PATIENCE_S * 1e3)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Open HTML text or a file; at the end no request has left the page and no script has failed."""
    outside: list[str] = []
    faults: list[str] = []
    contexts = []

    def open_it(page: str | Path, width: int = 1200, height: int = 900, **options: object) -> Page:
        path = page if isinstance(page, Path) else tmp_path / f"page{len(contexts)}.html"
        if isinstance(page, str):
            path.write_text(page, encoding="utf-8")
        context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE_S * 1e3)
        own = path.resolve().as_uri()
        inside = ("data:", "blob:", own)
        tab.on("request", lambda request: request.url.startswith(inside) or outside.append(request.url))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: message.type == "error" and faults.append(message.text))
        tab.goto(own)
        return tab

    yield open_it
    for context in contexts:
        context.close()
    assert not outside and not faults
