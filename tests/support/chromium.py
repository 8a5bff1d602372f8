"""The Chromium of this machine, for tests in a browser and for the pictures of the docs."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def binary() -> str | None:
    """Where it lies, the first of ``NAMES`` that is on the PATH; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)
