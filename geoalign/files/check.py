"""One thing that a run needs, how it stands with it on this machine, and how that is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from geoalign.errors import CheckpointError, UserError
from geoalign.files.need import Need

State = Literal["present", "absent", "wrong"]
MARKS: dict[State, str] = {"present": "[x]", "absent": "[ ]", "wrong": "[!]"}


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked for and what was found.

    Attributes:
        name: the thing, in a few words.
        state: there, not there, or there and not usable.
        what: where it was looked for and what is known of it.
        fix: what to do; a command where there is one, empty for what is present.
        error: what a run would end with, where looking ended so.
        place: where ``fix`` puts it, of what is absent and can be fetched.
    """

    name: str
    state: State
    what: str
    fix: str = ""
    error: UserError | None = field(default=None, compare=False, repr=False)
    place: Path | None = None


def absent(name: str, path: Path, fix: str, *, empty: bool = False) -> Check:
    """What is not at ``path``."""
    return Check(name, "absent", f"{path} is not there{' or empty' if empty else ''}", fix, place=path)


def look(name: str, fix: str, examine: Callable[[], str]) -> Check:
    """Present with the words that ``examine`` returns, wrong with the error that it raises."""
    try:
        return Check(name, "present", examine())
    except UserError as error:
        return Check(name, "wrong", str(error), fix, error)


def look_at(need: Need) -> Check:
    """Whether a file or folder is there and what it should be, by its headers."""
    if not need.path.exists():
        return absent(need.title, need.path, need.get)
    return look(need.title, f"download it again: {need.get}", lambda: f"{need.path}: {need.verify(need.path)}")


def require(needs: Iterable[Need]) -> None:
    """Raise UserError for the first that is missing or another thing."""
    for check in map(look_at, needs):
        if check.error is not None:
            raise check.error
        if check.state != "present":
            raise CheckpointError(f"{check.name}: {check.what}; {check.fix}")


def lines_of(checks: Sequence[Check]) -> list[str]:
    """A line for each, and its way out below; a way out that serves several is said once, below the last of them."""
    last = {check.fix: number for number, check in enumerate(checks)}
    width = max((len(check.name) for check in checks), default=0) + 2
    lines = []
    for number, check in enumerate(checks):
        first, *more = check.what.splitlines()
        lines += [f"  {MARKS[check.state]} {check.name:<{width}}{first}", *(f"{'':<8}{line}" for line in more)]
        if check.fix and last[check.fix] == number:
            lines += [f"{'':<8}{line}" for line in check.fix.splitlines()]
    return lines
