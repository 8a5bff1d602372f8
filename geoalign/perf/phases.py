"""Work of every phase of one iteration, by the cost model: what a trace or a benchmark is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from geoalign.perf.budget import Plan, Walk, count_passes
from geoalign.perf.cost import TransformerCost
from geoalign.perf.devices import DeviceProfile


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """FLOPs, bytes of the memory-bound passes, and predicted seconds (None without a device profile)."""

    flops: float
    bytes: float
    seconds: float | None


def phase_work(
    cost: TransformerCost,
    plan: Plan,
    walk: Walk,
    conditions: int,
    group_size: int,
    updates: int,
    device: DeviceProfile | None,
    positions: Sequence[int] | None = None,
) -> dict[str, PhaseWork]:
    """Phases by the names of their spans; decoding, scoring and the optimizer are not modelled.

    Streamed backwards run inside the window; only the merged first step is left to the update. ``positions`` of the
    window are learned from (None: all).
    """
    count = count_passes(walk, conditions, group_size, updates, plan, positions)
    speedups, streamed = plan.speedups, 0.0
    if plan.stream_backward:
        streamed = 1.0 - count.replay / count.backward

    def forwards(number: float, *, outside: bool = False, recompute: bool = False, plan: Plan = plan) -> PhaseWork:
        kept = recompute and plan.keep_attention
        flops = cost.forward_flops() - kept * cost.layers * cost.block_flops()["self_attention"]
        traffic = cost.traffic_bytes(speedups.kernels, no_gradient=outside)
        if device is None:
            return PhaseWork(number * flops, number * traffic, None)
        mode = plan.attention if outside else "exact"
        kernels = replace(speedups, int8_linear=outside and plan.int8_linears)
        seconds = cost.forward(device, kernels, attention=mode, no_gradient=outside)
        return PhaseWork(
            number * flops, number * traffic, number * (seconds.total - (seconds.attention if kept else 0.0))
        )

    backward_s = None if device is None else count.backward * cost.backward(device, speedups).total
    backwards = PhaseWork(
        count.backward * cost.backward_flops(), 2.0 * count.backward * cost.traffic_bytes(speedups.kernels), backward_s
    )
    learner = _sum((forwards(count.recompute, recompute=True), 1.0), (backwards, 1.0))
    return {
        "rollout/prefix": forwards(count.prefix, outside=True, plan=plan.with_exact_steps()),
        "rollout/window": _sum((forwards(count.window), 1.0), (learner, streamed)),
        "rollout/tail": forwards(count.tail, outside=True),
        "update/forward": forwards(count.replay),
        "update/backward": _sum((learner, 1.0 - streamed)),
    }


def _sum(*parts: tuple[PhaseWork, float]) -> PhaseWork:
    """Weighted sum; seconds are unknown where one part's are."""
    seconds = None if any(work.seconds is None for work, _ in parts) else sum((w.seconds or 0) * x for w, x in parts)
    return PhaseWork(sum(w.flops * x for w, x in parts), sum(w.bytes * x for w, x in parts), seconds)
