"""What a row will cost in seconds, by the cost model of the card and by assumptions that are written down here.

Nothing is free: a row without a rate is priced like the slowest row of its case that has one, an unknown card like the
slowest known one. Compilers, exact results and imports are assumed, generously: they decide what is started at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol

from bench_timing import calls_for

from geoalign.perf.devices import DEVICES, DeviceProfile

START_S = 15.0
"""Until the first ceiling: imports of torch, Triton and rivals from a disk that is not warm."""
CEILINGS_S = 6.0
"""One set of ceilings, warm-up included."""
COMPILE_S, TRITON_S = 15.0, 3.0
"""`torch.compile` of one function and direction; our kernel of one op and direction."""
CASE_S = 1.0
"""Operands of a case, and its exact results on sampled tokens."""
BESIDE = 6
"""Calls of a row beside the timed ones: two on poisoned memory, one that is counted, those that a backward rests on."""
OURS = frozenset({"ours", "triton", "int8", "int8_fp8"})
"""Implementations whose kernels Triton compiles at their first call."""
COMPILED = frozenset({"compiled", "torchao"})
"""Those that `torch.compile` makes."""
SLOWEST = min(DEVICES.values(), key=lambda profile: profile.attention)


class Priced(Protocol):
    """What is asked of a case."""

    @property
    def name(self) -> str:
        """Of the op."""
        ...

    @property
    def variant(self) -> str:
        """Of the op."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the op."""
        ...

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(implementation, direction)."""
        ...

    def absent(self, impl: str) -> str:
        """Why it is not there."""
        ...

    def predicted_ms(self, profile: DeviceProfile, impl: str, direction: str) -> float | None:
        """By the cost model."""
        ...

    def truth_s(self, direction: str) -> float:
        """Seconds that its exact results take beyond `CASE_S`."""
        ...


class Prices:
    """Prices on one card; what is made once is paid once.

    Args:
        profile: of the card; None: unknown.
    """

    def __init__(self, profile: DeviceProfile | None) -> None:
        self.profile = profile or SLOWEST
        self._paid: set[Hashable] = set()

    def call_ms(self, case: Priced, impl: str, direction: str) -> float:
        """Milliseconds of one call."""
        known = {row: case.predicted_ms(self.profile, *row) for row in case.rows if not case.absent(row[0])}
        return known.get((impl, direction)) or max((ms for ms in known.values() if ms), default=1.0)

    def row(self, case: Priced, impl: str, direction: str) -> float:
        """Seconds of a row: its calls, and what has to be made for it first."""
        ms = self.call_ms(case, impl, direction)
        once = sum(cost for key, cost in self._once(case, impl, direction) if key not in self._paid)
        return 1e-3 * ms * (sum(calls_for(ms)) + BESIDE) + once

    def pay(self, case: Priced, impl: str, direction: str) -> float:
        """The same of a row that is measured now."""
        price = self.row(case, impl, direction)
        self._paid.update(key for key, _ in self._once(case, impl, direction))
        return price

    @staticmethod
    def _once(case: Priced, impl: str, direction: str) -> Iterator[tuple[Hashable, float]]:
        this = (case.name, case.variant, case.shape)
        yield this, CASE_S
        yield (this, direction), case.truth_s(direction)
        if impl in OURS:
            yield (case.name, impl, direction), TRITON_S
        if impl in COMPILED:
            yield (this, impl, direction), COMPILE_S
