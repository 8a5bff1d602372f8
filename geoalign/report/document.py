"""The shell of every page: one file, styles and scripts inside, and a policy by which no request can leave it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from geoalign.report.film import FILM_CLASS

# What a page may load: pictures inside it, its own styles and scripts. Any address is refused by the browser.
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)


def document(
    title: str, body: str, *, styles: Sequence[str] = (), scripts: Sequence[str] = (), refresh_s: int | None = None
) -> str:
    """A whole HTML document; the film component's style and script are added where ``body`` holds a film.

    Args:
        title: of the window, plain text.
        body: markup.
        styles: further style sheets of this package, by file name.
        scripts: further scripts of this package, by file name.
        refresh_s: the page loads itself anew after so many seconds in which nobody touched it; None: never.
    """
    films = f'class="{FILM_CLASS}' in body
    css = "".join(_asset(name) for name in ("style.css", *(["film.css"] if films else []), *styles))
    parts = "".join(f"<script>{_asset(name)}</script>" for name in (*(["film.js"] if films else []), *scripts))
    if refresh_s:
        parts += f"<script>const geoalignRefresh = {refresh_s};{_asset('refresh.js')}</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>\n'
        f"<body>{body}{parts}</body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("geoalign.report").joinpath(name).read_text(encoding="utf-8")
