"""What a run will take before it is started: cases, passes of the network, hours and disk; all of it predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from geoalign.benchmark.methods import ModelMethod
from geoalign.benchmark.run import Plan, left_over
from geoalign.benchmark.store import Store
from geoalign.jobs.progress import bytes_text, clock_text
from geoalign.jobs.sample import matmul_rate
from geoalign.perf.cost import TransformerCost

BYTES_PER_PIXEL = 0.1
"""Of an mp4 at crf 10: the clip bear of DAVIS at 480 x 832 took 0.09 when it had been compressed before."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted work.

    Attributes:
        cases, open_cases: of all methods, and without those that are done.
        frames: length of a retake of our models -> how many cases have it; empty without a model of ours.
        passes: of the network, over all cases of our models.
        tflop: of these.
        device_hours: from a matrix product measured on this device; readers and tools are not in it.
        device: where it was measured; "" without a model of ours.
        disk_gb: of their videos.
    """

    cases: int
    open_cases: int
    frames: Mapping[int, int]
    passes: int
    tflop: float
    device_hours: float
    device: str
    disk_gb: float

    def text(self, processes: int) -> str:
        """For people: what is known, which of videos that others made is their number alone."""
        cases = f"cases   {self.cases:,}, of which {self.open_cases:,} are not done"
        if not self.frames:
            return cases
        lengths = sorted(self.frames)
        span = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
        hours = self.device_hours / processes
        told = f"{hours:,.3g} h" if hours >= 1 else clock_text(3600 * hours)
        return "\n".join(
            (
                f"{cases}; retakes of our models have {span} frames",
                f"passes  {self.passes:,} of the network, {self.tflop:,.3g} TFLOP, for all cases of our models",
                f"time    about {told} of sampling in {processes} process(es), predicted from a matrix product "
                f"on {self.device}; readers and tools come on top",
                f"disk    about {bytes_text(self.disk_gb * 1e9)} of videos",
            )
        )


def forecast(plan: Plan, store: Store, *, retry_failed: bool = False) -> Forecast:
    """Predict a whole run: the cases of our models. Reads lengths and sizes of clips, no weights and no other videos.

    ``retry_failed``: cases that failed count as not done.
    """
    lengths = Counter[int]()
    shape = lru_cache(None)(lambda clip: (plan.clips.native_frames(clip), *plan.clips.size_of(clip)))
    passes, flop, pixels, hours, device = 0, 0.0, 0.0, 0.0, ""
    for method in (m for m in plan.methods.values() if isinstance(m, ModelMethod)):
        own = [case.condition for case in plan.cases if case.method == method.name]
        counted = Counter(
            (method.frames(condition, native), *size) for condition in own for native, *size in [shape(condition.clip)]
        )
        device, dtype = str(method.device), method.dtype
        work = 0.0
        for (frames, height, width), count in counted.items():
            lengths[frames] += count
            cost = TransformerCost.of(method.files.config, frames, height, width)
            forwards = method.steps * (2 if method.guidance != 1.0 else 1)
            passes += count * forwards
            # The adapter runs once: its output is kept with the condition.
            work += count * (forwards * (cost.forward_flops() - cost.adapter_flops()) + cost.adapter_flops())
            pixels += count * frames * height * width
        flop += work
        hours += work / matmul_rate(dtype, device) / 3600
    disk = pixels * BYTES_PER_PIXEL / 1e9
    left = left_over(store, plan, retry_failed=retry_failed)
    return Forecast(len(plan.cases), left, lengths, passes, flop / 1e12, hours, device, disk)
