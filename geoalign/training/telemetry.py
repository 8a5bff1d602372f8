"""What an iteration cost: network passes against the cost model, arithmetic rate, memory."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from geoalign.config.schema import Config
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepTable
from geoalign.perf.budget import PassCount, Plan, Walk, count_passes
from geoalign.perf.cost import TransformerCost
from geoalign.perf.devices import peak_flops
from geoalign.training.processes.ranks import RankRows


def plan_of(config: Config) -> Plan:
    """What the cost model must know of the switches that change the number of passes."""
    levers = config.levers
    return Plan(
        share_prefix=levers.share_prefix,
        merge_first=levers.merge_first_step,
        checkpoint=levers.recompute != "none",
        keep_attention=levers.recompute == "keep_attention",
        stream_backward=levers.streaming != "off",
        replay_first=levers.streaming in ("device", "host"),
        guidance=2 if config.flow.guidance > 1 else 1,
        reference=config.objective.kl_weight > 0,
        learned_steps=config.learn.window_steps,
        learned_members=config.learn.members,
    )


def walk_of(config: Config, table: StepTable, reused: int | None = None) -> Walk:
    """The evaluated steps of a table; ``reused`` of its tail are not: by default as many as ``ode.reuse`` says."""
    assert table.window is not None
    start, size = table.window.start, table.window.size
    tail = table.num_steps - start - size
    return Walk(start, size, config.ode.evaluated(tail) if reused is None else tail - reused)


@dataclass(frozen=True, slots=True)
class WorkMeter:
    """Counts and rates of one rank.

    Attributes:
        config: of the run.
        rank_rows: the rollouts of this rank.
        device: where they run.
    """

    config: Config
    rank_rows: RankRows
    device: torch.device

    def passes(self, rollout: Rollout, learned: Counter[str], audited: int = 0) -> PassCount:
        """Passes that were run, counted where the forwards are."""
        backward = learned["backward"]
        return PassCount(
            rollout.forwards.prefix,
            rollout.forwards.window,
            rollout.forwards.tail,
            learned["replay"],
            backward if self.config.levers.recompute != "none" else 0,
            backward,
            learned["reference"],
            audited,
        )

    def predicted(self, sampler: FlowSampler, positions: Sequence[int], audit: int) -> PassCount:
        """Passes that the cost model expects of an iteration.

        Args:
            sampler: with its table and what its tail reuses.
            positions: of the window, that are learned from.
            audit: passes of an audit.
        """
        walk = walk_of(self.config, sampler.table, len(sampler.reused))
        groups, members = self.rank_rows.group_ids.numel(), self.rank_rows.member_ids.numel()
        plan, updates = plan_of(self.config), self.config.optim.updates_per_rollout
        return replace(count_passes(walk, groups, members, updates, plan, positions), audit=audit)

    def metrics(
        self,
        spent: PassCount,
        sampler: FlowSampler,
        positions: Sequence[int],
        audit: int,
        seconds: float,
        frames: int,
    ) -> dict[str, float]:
        """Everything under ``perf/`` of an iteration on videos of that many frames; others as in :meth:`predicted`."""
        numbers = {
            "perf/forwards_rollout": float(spent.rollout),
            "perf/forwards_learner": float(spent.replay + spent.reference),
            "perf/forwards_recomputed": float(spent.recompute),
            "perf/forwards_audit": float(spent.audit),
            "perf/backwards": float(spent.backward),
            "perf/forward_equivalents": float(spent.forward_equivalents),
            "perf/predicted_forward_equivalents": float(self.predicted(sampler, positions, audit).forward_equivalents),
            "perf/peak_memory_gb": self._peak_memory() / 1e9,
        }
        rate = self._model_flops(spent, frames) / seconds
        numbers["perf/model_tflop_per_s"] = rate / 1e12
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return numbers if peak is None else numbers | {"perf/mfu": rate / peak}

    def _model_flops(self, spent: PassCount, frames: int) -> float:
        """Arithmetic of the network, repeated forwards left out; ranks that share tokens do a part each."""
        work = TransformerCost.of(self.config.model, frames, *self.config.data.video[1:])
        forwards = spent.forwards - spent.recompute
        total = forwards * work.forward_flops() + spent.backward * work.backward_flops()
        return total / self.config.parallel.sequence

    def _peak_memory(self) -> float:
        """Largest number of bytes allocated on the GPU since the last call, or resident in this process so far."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(peak)
