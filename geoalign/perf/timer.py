"""Seconds per phase of an iteration, without stopping the device between phases."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from geoalign.perf.spans import span

_active: contextvars.ContextVar[PhaseTimer | None] = contextvars.ContextVar("geoalign_phase_timer", default=None)


def phase(name: str) -> contextlib.AbstractContextManager[object]:
    """Charge a block to ``name`` on the timer that is active in this thread; without one it is only a span."""
    timer = _active.get()
    return span(name) if timer is None else timer.phase(name)


class PhaseTimer:
    """Adds up the seconds of named phases until :meth:`collect`.

    On a CUDA device a phase is timed by events on the current stream, so kernels are charged to the phase that
    launched them and nothing waits; the one synchronisation is in :meth:`collect`. On the CPU it is the wall clock.
    Phases may nest (``rollout`` around ``rollout/window``) and repeat: times add up by name, and a phase contains the
    phases inside it. Every phase is also a :class:`~geoalign.perf.spans.span` of the same name.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._depth = 0
        self._started, self._between = time.perf_counter(), 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._outermost = 0.0
        self._events: list[tuple[str, bool, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[PhaseTimer]:
        """Let :func:`phase` find this timer inside the block, in this thread; the iteration's clock starts here."""
        now = time.perf_counter()
        self._between, self._started = now - self._started, now
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the body to ``name``, also when it raises."""
        self._depth += 1
        start = self._mark()
        try:
            with span(name):
                yield
        finally:
            self._depth -= 1
            self._close(name, start, self._mark())

    def collect(self) -> dict[str, float]:
        """Return ``time/<phase>_s`` for every phase, ``time/iteration_s`` and ``time/other_s``, and start anew.

        ``time/iteration_s`` is the wall time since :meth:`active` (without it, since the last collection or
        construction); ``time/other_s`` is the part of it outside all phases: idle time and unnamed work.
        ``time/between_s`` went by before :meth:`active`: set-up, evaluation, checkpoints.
        """
        if self._cuda:
            torch.cuda.synchronize()
        for name, outermost, start, stop in self._events:
            self._add(name, outermost, start.elapsed_time(stop) / 1000.0)
        now = time.perf_counter()
        wall = now - self._started
        result = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        result["time/iteration_s"] = wall
        result["time/other_s"] = max(wall - self._outermost, 0.0)
        result["time/between_s"] = self._between
        self._started, self._between, self._outermost = now, 0.0, 0.0
        self._seconds.clear()
        self._events.clear()
        return result

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, name: str, start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> None:
        outermost = self._depth == 0
        if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
            self._events.append((name, outermost, start, stop))
        elif isinstance(start, float) and isinstance(stop, float):
            self._add(name, outermost, stop - start)

    def _add(self, name: str, outermost: bool, seconds: float) -> None:
        self._seconds[name] += seconds
        if outermost:
            self._outermost += seconds
