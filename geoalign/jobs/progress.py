"""The progress bar of long verbs."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:  # type: ignore[type-arg]
    """A progress bar with ETA on a terminal, of one of the ranks; silent elsewhere."""
    silent = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=silent, dynamic_ncols=True)
