"""The checkpoints of a run by their names: which folders are some, of which iteration, which is the newest."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Their folder in that of a run."""
CHANGED = "changed"
"""Key of their notes, and of a run's ``env.json`` and ``summary.json``: with what else the run went on from one of them
(``--allow-config-change``), as a list of ``iteration``, the number of those done by then, and ``what``, in words."""
_NAME = re.compile(r"step_(\d{6})$")


def iteration_of(path: Path) -> int | None:
    """The iterations that a checkpoint's name tells; None for another name, such as that of one set aside."""
    found = _NAME.search(path.name)
    return None if found is None else int(found[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; those being written, deleted or set aside have other names and are never listed."""
    return sorted(path for path in folder.glob("step_*") if iteration_of(path) is not None)
