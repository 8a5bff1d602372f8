"""How far long work is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY_S = 30.0
_RECENT = 10


class _Lines:
    """What a bar is in a log: a line on stderr whenever LOG_EVERY_S have passed; shorter work says nothing."""

    def __init__(self, total: int | None, what: str, unit: str, initial: int) -> None:
        self.total, self._what, self._unit, self._done, self._more = total, what, unit, initial, ""
        self._first, self._began, self._told = initial, time.monotonic(), time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._told < LOG_EVERY_S:
            return
        self._told = now
        rate = (self._done - self._first) / (now - self._began)
        left = f", ETA {clock_text((self.total - self._done) / rate)}" if self.total and rate > 0 else ""
        more = f", {self._more}" if self._more else ""
        say(f"{self._what}: {self._done:,} of {self.total or '?'} {self._unit}s{left}{more}")

    def set_description(self, desc: str) -> None:
        self._what = desc

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self._more = s

    def close(self) -> None:
        """Nothing is left to do."""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Nothing(_Lines):
    """What a bar is on the other ranks."""

    def update(self, n: int = 1) -> None:
        return None


def bar(total: int | None, what: str, unit: str, initial: int = 0, *, shown: bool = True) -> tqdm[Any] | _Lines:
    """A progress bar with ETA on a terminal, lines now and then elsewhere; of one of the ranks, if ``shown``."""
    if not (shown and _speaks()):
        return _Nothing(total, what, unit, initial)
    if not sys.stderr.isatty():
        return _Lines(total, what, unit, initial)
    from tqdm import tqdm  # only here, so that the first line of a verb needs no package

    return tqdm(total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True)


def say(text: str) -> None:
    """A line about what goes on, of one of the ranks: to stderr, at once, with the time of day off a terminal."""
    if _speaks():
        stamp = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
        print(f"{stamp}{text}", file=sys.stderr, flush=True)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def clock_text(seconds: float) -> str:
    """``seconds`` as people read a clock: 4 s, 3:07, 12:03:07, 2 d 3:00:00."""
    whole = round(seconds)
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes}:{rest:02}"
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def bytes_text(count: float) -> str:
    """``count`` bytes with a unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class RunProgress:
    """How a training run is watched: the bar on a terminal, one line per iteration elsewhere.

    Args:
        total: iterations of the run.
        first: iterations that are done already.
    """

    def __init__(self, total: int, first: int) -> None:
        self._total, self._terminal = total, sys.stderr.isatty()
        self._bar = bar(total, "training", "it", first, shown=self._terminal)
        self._marks = deque([time.monotonic()], maxlen=_RECENT + 1)

    def tell(self, done: int, numbers: Mapping[str, float]) -> None:
        """Iteration number ``done`` (from 1) has ended with these metrics."""
        self._marks.append(time.monotonic())
        self._bar.set_postfix_str(headline(numbers), refresh=False)
        self._bar.update()
        if not self._terminal:
            say(iteration_line(done, self._total, self._seconds_each(), numbers))

    def _seconds_each(self) -> float:
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def iteration_line(done: int, total: int, seconds_each: float, numbers: Mapping[str, float]) -> str:
    """Everything that a glance at a log needs, on one line.

    Args:
        done: iterations that are done, of ``total``.
        seconds_each: recent mean, from which the remaining time follows.
        numbers: metrics of the iteration, by the names of docs/metrics.md; what is missing is left out.
    """
    took = f"{numbers['time/iteration_s']:.1f} s" if "time/iteration_s" in numbers else ""
    keys = [name.split("/")[1] for name in numbers if name.startswith("advantage/") and name.endswith("/mean")]
    parts = [
        f"iteration {done}/{total}",
        took,
        f"ETA {clock_text((total - done) * seconds_each)}",
        " ".join(f"{key} {numbers[f'reward/{key}']:+.3f}" for key in keys if f"reward/{key}" in numbers),
        headline(numbers),
        _held_out(numbers),
        _lost(numbers),
        _phases(numbers),
    ]
    return " | ".join(part for part in parts if part)


def headline(numbers: Mapping[str, float]) -> str:
    """Errors in metres and degrees, and how far the probability ratio is from 1."""
    shown = (("reward/trans_m", "{:.3f} m"), ("reward/rot_deg", "{:.2f} deg"))
    parts = [text.format(numbers[key]) for key, text in shown if key in numbers]
    if "policy/ratio_max" in numbers:
        low, high = numbers.get("policy/ratio_min", 1.0), numbers["policy/ratio_max"]
        parts.append("ratio 1" if low == high == 1.0 else f"ratio {low:.4f} to {high:.4f}")
    return ", ".join(parts)


def _held_out(numbers: Mapping[str, float]) -> str:
    found = [name for name in numbers if name.startswith("eval/") and name.endswith("_translation_error_m")]
    return "held-out " + ", ".join(f"{numbers[name]:.3f} m" for name in found) if found else ""


def _lost(numbers: Mapping[str, float]) -> str:
    lost, failed = numbers.get("reward/lost_fraction", 0.0), numbers.get("reward/invalid_fraction", 0.0)
    skipped = numbers.get("policy/skipped_updates", 0.0)
    return f"lost {lost:.0%}, failed {failed:.0%}" + (f", {skipped:.0f} updates skipped" if skipped else "")


def _phases(numbers: Mapping[str, float]) -> str:
    """Seconds by phase; decoding is part of scoring."""
    phases = {
        "data": ("time/data_s",),
        "rollout": tuple(
            name for name in numbers if name.startswith("time/rollout/") and name != "time/rollout/decode_s"
        ),
        "scoring": ("time/scoring_s",),
        "update": tuple(name for name in numbers if name.startswith("time/update/")),
        "between": ("time/between_s",),
    }
    seconds = {phase: sum(numbers.get(name, 0.0) for name in names) for phase, names in phases.items()}
    told = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    return f"s: {told}" if any(seconds.values()) else ""
