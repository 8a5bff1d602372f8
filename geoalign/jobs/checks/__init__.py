"""What a run needs, in one registry that ``geoalign doctor`` prints and that every run consults before it starts.

A new kind of thing is one entry of :data:`SOURCES`: a function of the configuration that yields a :class:`Check` for
everything it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from geoalign.config.packages import packages
from geoalign.config.schema import Config
from geoalign.errors import MissingInputsError
from geoalign.files.check import Check, lines_of
from geoalign.jobs.checks import inputs, machine


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
    Source("packages", ("train", "prepare"), packages),
    Source("policy", ("train",), inputs.policy),
    Source("autoencoder", ("train", "prepare"), inputs.autoencoder),
    Source("encoders", ("prepare",), inputs.encoders),
    Source("rewards", ("train",), inputs.rewards),
    Source("drift profile", ("train",), inputs.drift),
    Source("clips", ("train", "prepare"), inputs.clips),
    Source("camera paths", ("train",), inputs.camera_paths),
    Source("cache", ("train",), inputs.cache),
    Source("benchmark", ("benchmark",), inputs.benchmark),
)
"""In the order in which a person gets them."""


def collect(config: Config, verb: str | None = None) -> list[Check]:
    """Everything that ``config`` needs, of the machine too, or only what ``verb`` refuses to start without."""
    found = [check for source in SOURCES if verb is None or verb in source.verbs for check in source.look(config)]
    return found if verb is not None else [*found, *machine.disk(config, found), *machine.devices(config)]


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
