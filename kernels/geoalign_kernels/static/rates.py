"""Rates of one multiprocessor per clock cycle, and how many of them a card has.

Sources: CUDA C++ programming guide, table of arithmetic throughput (16 exponentials, four schedulers, 128 bytes of
shared memory a cycle); the A100 and H100 white papers (dense products); data sheets (multiprocessors, clocks,
bandwidth).
"""

from __future__ import annotations

from typing import NamedTuple


class Achieved(NamedTuple):
    """Published over modelled rates of attention kernels that others measured, see docs/kernels.md.

    Attributes:
        low, high: the ends of what was published; ``low`` is for a model without credit for overlap, which no published
            kernel has calibrated.
        expected: taken for a prediction.
    """

    low: float
    expected: float
    high: float


class Rates(NamedTuple):
    """What one multiprocessor does per cycle, and the card that is meant.

    Attributes:
        products16, products8: multiply-adds of 16-bit and of 8-bit operands on its tensor cores.
        multiprocessors, clock_hz: of the card; its clock under load.
        asynchronous: a warp goes on while its product runs, and has to wait for it (sm_90).
        bandwidth: bytes per second of the card's memory that streaming kernels reach.
        achieved: share of the modelled rate that attention kernels reach.
    """

    products16: int
    products8: int
    multiprocessors: int
    clock_hz: float
    asynchronous: bool
    bandwidth: float
    achieved: Achieved


SCHEDULERS = 4
EXPONENTIALS = 16
SHARED_BYTES = 128
RATES = {
    80: Rates(1024, 2048, 108, 1.41e9, False, 0.80 * 2039e9, Achieved(0.54, 0.6, 0.64)),
    90: Rates(2048, 4096, 132, 1.755e9, True, 0.90 * 4300e9, Achieved(0.75, 0.9, 0.97)),
}
"""By target: an A800 or A100 at its boost clock, an H200 at 1.755 GHz.

sm_80: FlashAttention 2, bound by its tensor cores there, was published at 188 of 312 TFLOP/s (0.60), Triton's example
at 0.89 of FlashAttention 2 at head size 128 (0.54), SageAttention 2 at 266 of the 416 that int8 scores and 16-bit
values allow (0.64). sm_90: Triton's example, modelled at 560 TFLOP/s from its compiled kernel, at 420 to 477 (from
0.75); SageAttention 1, modelled at 533, at 518 (0.97).
"""
