"""One thing that a run needs, and how it stands with it on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from geoalign.errors import UserError
from geoalign.files.need import Need

State = Literal["present", "absent", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked for and what was found.

    Attributes:
        name: the thing, in a few words.
        state: there, not there, or there and not usable.
        what: where it was looked for and what is known of it.
        fix: what to do; a command where there is one, empty for what is present.
        error: what a run would end with, where looking ended so.
    """

    name: str
    state: State
    what: str
    fix: str = ""
    error: UserError | None = field(default=None, compare=False, repr=False)


def look(name: str, fix: str, examine: Callable[[], str]) -> Check:
    """Present with the words that ``examine`` returns, wrong with the error that it raises."""
    try:
        return Check(name, "present", examine())
    except UserError as error:
        return Check(name, "wrong", str(error), fix, error)


def look_at(need: Need) -> Check:
    """Whether a file or folder is there and what it should be, by its headers."""
    if not need.path.exists():
        return Check(need.title, "absent", f"{need.path} is not there", need.get)
    return look(need.title, f"download it again: {need.get}", lambda: f"{need.path}: {need.verify(need.path)}")
