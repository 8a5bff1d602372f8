"""How geoalign and its optional parts are installed, as every message says it: from a checkout, no index holds it."""

from __future__ import annotations


def install(extra: str = "", options: str = "") -> str:
    """The command that installs geoalign, or its optional part ``extra``, and where it is given."""
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install {options + ' ' if options else ''}{what} in a clone of geoalign"
