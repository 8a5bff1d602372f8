"""By what a result is sliced: the paper's list of failures (A.1) as things that can be measured of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from geoalign.benchmark.columns import Row

Bins = list[tuple[str, list[Row]]]
_QUANTILES = (1 / 3, 2 / 3)


@dataclass(frozen=True, slots=True)
class Slice:
    """One way to slice.

    Attributes:
        name: of its files.
        title: what the cases are sliced by.
        value: of a row: a text, or a number that is cut at its terciles; None where it is not known.
        source: what must be there to know it.
    """

    name: str
    title: str
    value: Callable[[Row], Any]
    source: str

    def bins(self, rows: Sequence[Row]) -> Bins:
        """The rows by slice, in order; empty where nothing is known."""
        known = [(value, row) for row in rows if (value := self.value(row)) is not None]
        if not known:
            return []
        if isinstance(known[0][0], str):
            return [
                (label, [row for value, row in known if value == label])
                for label in dict.fromkeys(value for value, _ in known)
            ]
        return _terciles(known)


def _terciles(known: Sequence[tuple[float, Row]]) -> Bins:
    """Three bins of about equally many different cases; zero is a bin of its own, because many paths stand still."""
    values = sorted({(row["case"], value) for value, row in known})
    moving = np.array([value for _, value in values if value > 0])
    bins: Bins = []
    if still := [row for value, row in known if value <= 0]:
        bins.append(("0", still))
    if not len(moving):
        return bins
    edges = [0.0, *(float(edge) for edge in np.quantile(moving, _QUANTILES)), float("inf")]
    for low, high in pairwise(edges):
        inside = [row for value, row in known if value > 0 and low < value <= high]
        if inside:
            found = [value for value, row in known if value > 0 and low < value <= high]
            bins.append((_label(min(found), max(found)), inside))
    return bins


def _label(low: float, high: float) -> str:
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _fact(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get("facts", {}).get(name)


SLICES = (
    Slice("path", "path", lambda row: row["path"], "every row has one"),
    Slice("speed", "speed", lambda row: f"{row['speed']:g} x", "every row has one"),
    Slice("rotation", "rotation in degrees per frame", _fact("rotation_deg_per_frame"), "no case has a video"),
    Slice("translation", "translation in metres per frame", _fact("translation_m_per_frame"), "no case has a video"),
    Slice("dynamic", "share of annotated (moving) pixels", _fact("dynamic_share"), "the clips have no annotations"),
    Slice("near", "share of near pixels (below 2 m)", _fact("near_share"), "no depth of the sources is known"),
)
