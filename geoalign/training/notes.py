"""What a run found out and carries along in its checkpoints, each with what it was found under."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from geoalign.training.checkpoint import differences

logger = logging.getLogger(__name__)


def under(key: str) -> str:
    """Key of the notes: what ``key`` was found under."""
    return f"{key}_under"


def kept(notes: MutableMapping[str, Any], key: str, now: Mapping[str, Any], what: str) -> bool:
    """Whether ``notes`` hold ``key``, found under the same as ``now``; one of another is dropped, and the log says so.

    What an older checkpoint holds without saying what it was found under is taken as it is. Whatever is found from here
    on counts as found under ``now``.

    Args:
        now: JSON values by name.
        what: the finding, for the log.
    """
    then, known = notes.get(under(key)), key in notes
    notes[under(key)] = dict(now)
    if not known or then is None or then == now:
        return known
    del notes[key]
    logger.info("%s is dropped, because it was found under other settings: %s", what, differences(then, now))
    return False
