"""What lies under a folder of data: linked folders are searched, hidden and temporary files are never data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

# Unfinished downloads and copies, editors' and offices' leftovers.
_TEMPORARY = re.compile(r"~$|^~\$|^#.*#$|\.(?:tmp|temp|part|partial|crdownload|download|swp|bak)(?:\.|$)", re.I)


def is_visible(path: PurePath) -> bool:
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
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if folder.is_symlink() and folder is not root:
            if (identity := _identity(folder)) in entered:
                continue
            entered.add(identity)
            found.append(folder)
        for entry in _entries(folder):
            path = folder / entry.name
            if not entry.is_dir():
                found.append(path)
            elif entry.is_symlink():
                links.append(path)
            elif (identity := _identity(path)) not in entered:  # not reached through a link before
                entered.add(identity)
                found.append(path)
                folders.append(path)
    return sorted(found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Visible entries by name; what they are costs no call to the file system, links excepted."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if is_visible(Path(entry.name))), key=lambda entry: entry.name)
    except OSError:  # unreadable, or gone meanwhile: the same as rglob
        return []


def _identity(folder: Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino
