"""The progress bar of long verbs."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:  # type: ignore[type-arg]
    """A progress bar with ETA on a terminal; silent elsewhere."""
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True)
