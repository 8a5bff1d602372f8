"""``geoalign train --profile N``: a trace of one iteration, and what the cost model expects of it beside the trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from geoalign.files.atomic import atomic_write_json
from geoalign.perf.cost import Speedups, TransformerCost
from geoalign.perf.devices import peak_flops, profile_of
from geoalign.perf.phases import phase_work
from geoalign.rl.subset import learned_positions
from geoalign.training.telemetry import plan_of, walk_of
from geoalign.training.trainer import Trainer


@contextlib.contextmanager
def profiled(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Record the block; writes ``trace_NNNNNN.json.gz`` and ``trace_NNNNNN.work.json`` into ``folder``."""
    iteration = trainer.iteration
    work = expected_work(trainer)  # before the step: what it finds out, as a bad audit, is of the next ones
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    stem = folder / f"trace_{iteration:06d}"
    profiler.export_chrome_trace(f"{stem}.json.gz")
    atomic_write_json(stem.with_suffix(".work.json"), work)
    print(f"wrote {stem}.json.gz; read it with: python profiling/trace.py {stem}.json.gz")


def expected_work(trainer: Trainer) -> dict[str, object]:
    """Device, peak and the work of every phase of this rank's next iteration."""
    config, iteration, fast = trainer.config, trainer.iteration, trainer.acting.fast
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else ""
    profile = profile_of(name)
    core = trainer.policy.model.execution.core
    profile = profile.with_core(core) if profile and core else profile
    sampler, frames = trainer.next_sampler(), config.learn.frames(iteration, config.data.num_frames)
    speedups = Speedups("fused", cached=config.levers.cache_phases, pruned=config.levers.prune_source)
    # An approximate network may have one of the two alone; without a probe its attention is exact.
    plan = replace(plan_of(config), speedups=speedups).after_window(
        attention=config.ode.attention if fast and fast.execution.probe else "exact",
        linears=fast is not None and config.ode.linears != "exact",
    )
    rows, learn = trainer.rank_rows, config.learn
    work = phase_work(
        TransformerCost.of(config.model, frames, *config.data.video[1:]), plan,
        walk_of(config, sampler.table, len(sampler.reused)), rows.group_ids.numel(),
        rows.member_ids.numel(), config.optim.updates_per_rollout, profile,
        learned_positions(config.window.size, learn.window_steps, config.run.seed, iteration),
    )  # fmt: skip
    return {
        "device": name or "cpu",
        "core": core,
        "peak_flops": peak_flops(name),
        "phases": {phase: asdict(of) for phase, of in work.items()},
    }
