"""A file or folder without which something cannot be built: where it lies, how to get it, how to look at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geoalign.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that must lie on the disk.

    Attributes:
        title: what it is, in a few words.
        path: where it is looked for.
        get: the command that puts it there.
        verify: looks at what lies there by headers alone, reads no weights; returns a few words about it, and raises
            UserError if it is damaged or another thing.
    """

    title: str
    path: Path
    get: str
    verify: Callable[[Path], str]


def looks_like_tokenizer(folder: Path) -> str:
    """The words of a tokenizer in any of the published forms; raises CheckpointError for a folder without."""
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    for names in forms:
        if all((folder / name).is_file() for name in names):
            return " and ".join(names)
    listed = ", or ".join(" and ".join(names) for names in forms)
    raise CheckpointError(f"{folder}: holds no tokenizer ({listed})")
