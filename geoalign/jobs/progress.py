"""What long verbs say while they work."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:  # type: ignore[type-arg]
    """A progress bar with ETA on a terminal, of one of the ranks; silent elsewhere."""
    silent = not sys.stderr.isatty() or not _speaks()
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=silent, dynamic_ncols=True)


def say(text: str) -> None:
    """A line about what goes on, of one of the ranks; on stderr, so that results can be piped on."""
    if _speaks():
        print(text, file=sys.stderr, flush=True)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
