"""Errors that a user can cause and fix: one clear message each, no traceback, a documented exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_IN_PYTHON = ContextVar("geoalign_in_python", default=False)


@contextmanager
def told_in_python() -> Iterator[None]:
    """Below, :func:`argument` speaks as Python does; a decorator of what Python callers call."""
    before = _IN_PYTHON.set(True)
    try:
        yield
    finally:
        _IN_PYTHON.reset(before)


def argument(name: str, value: object = None, python: str | None = None) -> str:
    """An argument as whoever gave it writes it: ``--source-camera FILE`` of a verb, ``source_camera=FILE`` in Python.

    Args:
        name: as in Python.
        value: what follows; None: the name alone.
        python: all of it as Python writes it, where that is more than another spelling.
    """
    if _IN_PYTHON.get():
        return python or (name if value is None else f"{name}={value}")
    option = f"--{name.replace('_', '-')}"
    return option if value is None else f"{option} {value}"


class UserError(Exception):
    """Base of all errors whose message names the offending path or value and the fix."""

    exit_code = 1


class Stopped(UserError):
    """A signal stopped a run after it wrote its checkpoint: no error, and not finished (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


class UsageError(UserError):
    """Wrong arguments or an impossible request (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be used (exit code 2)."""


class DataError(UserError):
    """A clip, trajectory, cache or manifest that cannot be read or is inconsistent."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, of the wrong layout or for another model."""


class RewardError(UserError):
    """A reward that cannot be built (missing package, missing weights) or failed too often."""


class RunError(UserError):
    """A run that had to stop (a rank died, disk full, :class:`Refusal`)."""


class Refusal(RunError):
    """What an iteration found makes the run stop, on all ranks at once (a bad audit, parity broken, invalid samples).

    Attributes:
        iteration: that was begun and does not count.
        clean: the state is the one before the iteration, and nothing says that it is broken.
        repeats: started again as it is, the run would find the same.
        numbers: metrics of the iteration, as far as they are known.
    """

    def __init__(self, text: str, iteration: int, *, clean: bool = False, repeats: bool = True) -> None:
        super().__init__(text)
        self.iteration, self.clean, self.repeats = iteration, clean, repeats
        self.numbers: Mapping[str, float] = {}


class MissingInputsError(UserError):
    """What a run reads is missing or another thing; a line for each, so that all can be fetched at once."""
