"""The before/after comparison: numbers with their spread over noise seeds, and an honest verdict about each change."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from geoalign.config.load import flatten
from geoalign.report.words import HELD_OUT, Better, Metric

_MEASURED = ("samples", "seed", "noise_seeds")  # of eval
_DRAWN = ("clips", "trajectories", "seed")  # of the world, for what is trained on
_SAMPLER = ("steps", "shift", "guidance", "t_dtype")  # of flow: the tail's settings do not count


@dataclass(frozen=True, slots=True)
class Value:
    """Mean over noise seeds and, from two seeds on, their sample standard deviation."""

    mean: float
    spread: float | None

    @classmethod
    def parse(cls, entry: Any, per_noise_seed: Any = ()) -> Value | None:
        """Read a mean and the values that it was taken over; None for what is not a number."""
        if not isinstance(entry, int | float):
            return None
        seeds = [float(value) for value in per_noise_seed or () if value is not None]
        return cls(float(entry), statistics.stdev(seeds) if len(seeds) > 1 else None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric on one held-out set."""

    key: str
    metric: Metric
    before: Value
    after: Value

    @property
    def percent(self) -> float | None:
        """Relative change in per cent; None where a ratio of the two means nothing (dB, ratios, zero)."""
        if self.metric.better not in ("lower", "unknown") or self.before.mean == 0:
            return None
        return 100 * (self.after.mean / self.before.mean - 1)

    @property
    def change(self) -> tuple[float, int]:
        """The change as it is shown, with its number of decimals: per cent where that means something."""
        return (self.after.mean - self.before.mean, 2) if self.percent is None else (self.percent, 0)

    @property
    def gain(self) -> float:
        """How much better it got in the metric's own unit; negative: worse."""
        return gain(self.metric.better, self.before.mean, self.after.mean)

    @property
    def verdict(self) -> str:
        """``good`` or ``bad`` when the change exceeds the spread over noise seeds and shows in print, else ``even``.

        Without a spread (one noise seed) nothing can be said.
        """
        if self.before.spread is None or self.after.spread is None or round(*self.change) == 0:
            return "even"
        return judged(self.metric.better, self.before.mean, self.after.mean, max(self.before.spread, self.after.spread))


def gain(better: Better, before: float, after: float) -> float:
    """How much better ``after`` is than ``before``, in the metric's own unit; negative: worse."""
    if better == "higher":
        return after - before
    return abs(before - 1) - abs(after - 1) if better == "one" else before - after


def judged(better: Better, before: float, after: float, spread: float) -> str:
    """``good`` or ``bad`` where the gain exceeds ``spread``, else ``even``."""
    found = gain(better, before, after)
    if better == "unknown" or abs(found) <= spread:
        return "even"
    return "good" if found > 0 else "bad"


def comparisons(summary: Mapping[str, Any], kind: str) -> Iterator[Comparison]:
    """Yield the metrics of one held-out set in the order of the glossary, then those it does not know."""
    both = (summary.get("held_out") or {}).get(kind) or {}
    seeds = (summary.get("held_out_per_noise_seed") or {}).get(kind) or {}
    before, after, seeds_before, seeds_after = (
        present_names(stages.get(stage) or {}) for stages in (both, seeds) for stage in ("before", "after")
    )
    known = [key for key in HELD_OUT if key in before]
    for key in [*known, *(key for key in before if key not in HELD_OUT)]:
        first = Value.parse(before[key], seeds_before.get(key))
        second = Value.parse(after.get(key), seeds_after.get(key))
        if first and second:
            metric = HELD_OUT.get(key, Metric(key.replace("_", " "), "", "unknown", ""))
            yield Comparison(key, metric, first, second)


def conditions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that decide on which held-out scenes, paths and noise a run is measured, and how its
    retakes are sampled.

    Args:
        settings: those of the run by section, as ``config.yaml`` holds them; one that is not there has no key.
    """
    measured = {name: part for name, part in _section(settings, "eval").items() if name in _MEASURED}
    world = {name: part for name, part in _section(settings, "world").items() if name not in _DRAWN}
    flow = {name: part for name, part in _section(settings, "flow").items() if name in _SAMPLER}
    return flatten({"eval": measured, "world": world, "flow": flow})


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def present_names(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one stage and set under their present names.

    Runs begun before the translation gain had a name of its own called it ``scale_ratio``, and had no scale ratio.
    """
    if any(name.endswith("translation_gain") for name in rows):
        return dict(rows)
    return {name.replace("scale_ratio", "translation_gain"): value for name, value in rows.items()}
