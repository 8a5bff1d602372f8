"""What lies under a folder of data: linked folders are searched, hidden and temporary files are never data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

# Unfinished downloads and copies, editors' and offices' leftovers.
_TEMPORARY = re.compile(r"~$|^~\$|^#.*#$|\.(?:tmp|temp|part|partial|crdownload|download|swp|bak)(?:\.|$)", re.I)


def is_visible(path: Path) -> bool:
    """Whether a file or folder may hold data, by its name: neither hidden (``._0001.jpg``) nor temporary
    (``a.mp4.part``, ``a.tmp.mp4``)."""
    return not path.name.startswith(".") and not _TEMPORARY.search(path.name)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Those of ``paths`` that :func:`is_visible`, sorted."""
    return sorted(path for path in paths if is_visible(path))


def walk(root: Path) -> list[Path]:
    """All visible files and folders under ``root``, sorted; of a folder reached in several ways only one is searched.

    Folders that really lie under ``root`` are searched before links to folders, so that a link never takes the name of
    a folder that is there anyway; links in a circle end where they began.
    """
    found: list[Path] = []
    entered = {_identity(root)}
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        for entry in _entries(folder):
            if not entry.is_dir():
                found.append(entry)
            elif entry.is_symlink():
                links.append(entry)
            elif (identity := _identity(entry)) not in entered:
                entered.add(identity)
                found.append(entry)
                folders.append(entry)
        while links and not folders:  # the next link to a folder that was not entered yet
            if (identity := _identity(links[0])) in entered:
                links.pop(0)
                continue
            entered.add(identity)
            found.append(links[0])
            break
    return sorted(found)


def _entries(folder: Path) -> list[Path]:
    try:
        return visible(folder.iterdir())
    except OSError:  # unreadable, or gone meanwhile: the same as rglob
        return []


def _identity(folder: Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino
