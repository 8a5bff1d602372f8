"""``geoalign train --profile N``: a trace of one iteration, and what the cost model expects of it beside the trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from geoalign.config.schema import Config
from geoalign.files.atomic import atomic_write_json
from geoalign.flow.table import build_step_table
from geoalign.perf.budget import Walk
from geoalign.perf.cost import Speedups, TransformerCost
from geoalign.perf.devices import profile_of
from geoalign.perf.phases import phase_work
from geoalign.rl.window import WindowSchedule
from geoalign.training.telemetry import plan_of
from geoalign.training.trainer import Trainer


@contextlib.contextmanager
def profiled(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Record the block; writes ``trace_NNNNNN.json.gz`` and ``trace_NNNNNN.work.json`` into ``folder``."""
    iteration = trainer.iteration
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    stem = folder / f"trace_{iteration:06d}"
    profiler.export_chrome_trace(f"{stem}.json.gz")
    atomic_write_json(stem.with_suffix(".work.json"), expected_work(trainer.config, trainer, iteration))
    print(f"wrote {stem}.json.gz; read it with: python profiling/trace.py {stem}.json.gz")


def expected_work(config: Config, trainer: Trainer, iteration: int) -> dict[str, object]:
    """Device, peak and the work of every phase of one rank's iteration."""
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else ""
    profile = profile_of(name)
    core = trainer.policy.model.execution.core
    profile = profile.with_core(core) if profile and core else profile
    window = WindowSchedule(config.window, config.flow.steps, config.run.seed)(iteration)
    walk = Walk(window.start, window.size, build_step_table(config.flow, window).num_steps - window.stop)
    speedups = Speedups("fused", cached=config.levers.cache_phases, pruned=config.levers.prune_source)
    plan = replace(plan_of(config), speedups=speedups, int8_attention=trainer.acting.fast is not None)
    rows = trainer.rank_rows
    work = phase_work(
        TransformerCost.of(config.model, *config.data.video), plan, walk, rows.group_ids.numel(),
        rows.member_ids.numel(), config.optim.updates_per_rollout, profile,
    )  # fmt: skip
    return {
        "device": name or "cpu",
        "core": core,
        "peak_flops": profile.peak if profile else None,
        "phases": {phase: asdict(of) for phase, of in work.items()},
    }
