"""What a run needs, in one registry that ``geoalign doctor`` prints and that every run consults before it starts.

A new kind of thing is one entry of :data:`SOURCES`: a function of the configuration that yields a :class:`Check` for
everything it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from geoalign.config.schema import Config
from geoalign.errors import MissingInputsError
from geoalign.jobs.checks import inputs, machine
from geoalign.jobs.checks.check import Check, State, look, look_at

__all__ = ["SOURCES", "Check", "Source", "State", "collect", "lines_of", "look", "look_at", "require_inputs"]

MARKS = {"present": "[x]", "absent": "[ ]", "wrong": "[!]"}


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of thing to look for.

    Attributes:
        name: what it is, for people.
        verbs: the verbs that refuse to start without it; a run finds out about the others by itself.
        look: yields what it finds; raises nothing that a user can cause.
    """

    name: str
    verbs: tuple[str, ...]
    look: Callable[[Config], Iterable[Check]]


SOURCES = (
    Source("packages", ("train", "prepare"), machine.packages),
    Source("policy", ("train",), inputs.policy),
    Source("autoencoder", ("train", "prepare"), inputs.autoencoder),
    Source("encoders", ("prepare",), inputs.encoders),
    Source("rewards", ("train",), inputs.rewards),
    Source("drift profile", ("train",), inputs.drift),
    Source("clips", ("train", "prepare"), inputs.clips),
    Source("camera paths", ("train",), inputs.camera_paths),
    Source("cache", ("train",), inputs.cache),
    Source("benchmark", ("benchmark",), inputs.benchmark),
    Source("disk", (), machine.disk),
    Source("device", (), machine.devices),
)
"""In the order in which a person gets them."""


def collect(config: Config, verb: str | None = None) -> list[Check]:
    """Everything that ``config`` needs, or only what ``verb`` refuses to start without."""
    return [check for source in SOURCES if verb is None or verb in source.verbs for check in source.look(config)]


def require_inputs(config: Config, verb: str) -> None:
    """Look for everything that ``verb`` reads, before anything is loaded.

    Raises:
        MissingInputsError: with a line for each thing that is missing or wrong. One alone that is wrong keeps its own
            error.
    """
    bad = [check for check in collect(config, verb) if check.state != "present"]
    if len(bad) == 1 and bad[0].error is not None:
        raise bad[0].error
    if bad:
        verdict = f"{len(bad)} of the things that this run reads cannot be used (docs/real-weights.md):"
        raise MissingInputsError("\n".join([verdict, *lines_of(bad)]))


def lines_of(checks: Sequence[Check]) -> list[str]:
    """A line for each, and its way out below; a way out that serves several is said once, below the last of them."""
    last = {check.fix: number for number, check in enumerate(checks)}
    width = max((len(check.name) for check in checks), default=0) + 2
    lines = []
    for number, check in enumerate(checks):
        lines.append(f"  {MARKS[check.state]} {check.name:<{width}}{check.what}")
        if check.fix and last[check.fix] == number:
            lines += [f"{'':<8}{line}" for line in check.fix.splitlines()]
    return lines
