"""What a run would be, without loading weights or touching a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from geoalign.config.layout import deal_groups
from geoalign.config.schema import Config
from geoalign.errors import UsageError
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.jobs.pricing import measures_drift
from geoalign.models.dit import RetakeDiT
from geoalign.perf.budget import PassCount, count_passes
from geoalign.perf.memory import predict_memory
from geoalign.rl.window import WindowSchedule
from geoalign.training.engines.optim import freeze_all_but
from geoalign.training.processes.cores import ranks_of
from geoalign.training.processes.device import device_of, dtype_of
from geoalign.training.telemetry import plan_of, walk_of
from geoalign_kernels import resolve_attention


def describe_run(config: Config) -> Mapping[str, object]:
    """Title -> text, in the order in which a person asks.

    Raises:
        ConfigError: nothing would be trained, or the groups cannot be dealt to the processes of torchrun.
    """
    with torch.device("meta"):
        model = RetakeDiT(config.model)
    trained = freeze_all_but(model, config.optim.trainable)
    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    windows = sorted({(w.start, w.stop) for w in map(schedule, range(config.train.iterations))})
    total, group = sum(p.numel() for p in model.parameters()), config.groups
    moving = sum(p.numel() for p in trained.values())
    return {
        "run folder": config.run.folder,
        "model": f"{total:,} parameters, {moving:,} trained in {len(trained)} tensors",
        "base": " + ".join(str(path) for path in (config.train.base, config.train.delta) if path) or "none",
        "videos": _videos(config),
        "iteration": f"{group.conditions} conditions x {group.size} rollouts, {_steps(config, schedule(0))}",
        "windows": ", ".join(f"[{start}, {stop})" for start, stop in windows),
        "passes": _passes(config, schedule(0)),
        "rewards": ", ".join(f"{name} ({reward.kind})" for name, reward in config.rewards.items()) or "none",
        "execution": _execution(config),
        "processes": _processes(config),
        "memory": _memory(config, total, moving),
        "iterations": f"{config.train.iterations} (`geoalign budget` predicts the hours)",
    }


def _videos(config: Config) -> str:
    frames, height, width = config.data.video
    fewer, until = config.learn.short_frames, config.learn.short_iterations
    return f"{frames} x {height} x {width}" + (f", of {fewer} frames in the first {until} iterations" if fewer else "")


def _steps(config: Config, window: StepWindow) -> str:
    """Those of the time grid, and how many are evaluated where the steps after the window are fewer."""
    walk = walk_of(config, build_step_table(config.flow, window))
    evaluated = walk.prefix + walk.window + walk.tail
    grid = config.flow.steps
    return f"{grid} steps" + (f", of which the first window evaluates {evaluated}" if evaluated < grid else "")


def _passes(config: Config, window: StepWindow) -> str:
    """Of an iteration at the first window; of a subset of its steps, all equally likely, the mean."""
    table, groups = build_step_table(config.flow, window), config.groups

    def count(reused: int | None) -> PassCount:
        walk, updates = walk_of(config, table, reused), config.optim.updates_per_rollout
        return count_passes(walk, groups.conditions, groups.size, updates, plan_of(config))

    usual, drawn = count(None), config.learn.window_steps or window.stop - window.start
    share = drawn / (window.stop - window.start)
    forwards, backwards, recomputed = (
        f"{share * number:,.0f}" for number in (usual.replay + usual.reference, usual.backward, usual.recompute)
    )
    audit, notes = "", ["first window", "all ranks"]
    if share < 1:
        notes.append("of the learner the mean over the steps that are drawn")
    if measures_drift(config):
        notes.append(f"the first iteration evaluates all steps: {count(0).rollout:,} rollout forwards")
    if config.ode.audit_every:
        audited = plan_of(config).guidance * groups.size * (config.flow.steps - window.stop)
        audit = f", {audited:,} in an audit every {config.ode.audit_every} iterations"
    learner = f"{forwards} learner forwards, {backwards} backwards, {recomputed} recomputed"
    return f"{usual.rollout:,} rollout forwards, {learner}{audit} ({', '.join(notes)})"


def _execution(config: Config) -> str:
    run, levers = config.run, config.levers
    parts = [f"device {run.device}", f"matrices {run.dtype}", "compiled blocks" if run.compile else "eager blocks"]
    parts += [f"attention core {_core(config)}"] + ["repeatable backwards"] * run.deterministic
    parts += [f"recompute {levers.recompute}", f"streaming {levers.streaming}"]
    approximate = [f"{name} {value}" for name, value in config.changes().items()]
    return ", ".join(parts) + (f"; CHANGES: {', '.join(approximate)}" if approximate else "; all EXACT")


def _core(config: Config) -> str:
    """The core that is resolved on this machine, where nothing has to be measured."""
    if config.run.attention != "auto":
        return config.run.attention
    try:
        device = device_of(config.run)
    except UsageError:  # the run is meant for another machine
        return "of the card"
    core = resolve_attention(device, dtype_of(config.run, device), deterministic=config.run.deterministic)
    return f"{core} (on this machine)"


def _memory(config: Config, parameters: int, trained: int) -> str:
    if config.run.device == "cpu":
        return "that of a small model; predicted for GPUs only"
    matrix_bytes = 4 if config.run.dtype == "float32" else 2
    plan = predict_memory(config, parameters, trained, ranks_of(config), matrix_bytes=matrix_bytes)
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in plan.device.items() if size)
    host = "".join(f"; page-locked on the host: {name} {_gb(size)}" for name, size in plan.host.items())
    return f"{_gb(plan.device_total)} a process, predicted, without video decoder and workspaces: {parts}{host}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _processes(config: Config) -> str:
    size, parallel = ranks_of(config), config.parallel
    share = deal_groups(config.groups.conditions, config.groups.size, size, parallel.sequence)
    shared = f", {parallel.sequence} ranks share each video" if parallel.sequence > 1 else ""
    rollouts = f"{share.groups} groups x {share.members} rollouts each"
    return f"{size} ({parallel.engine}): {rollouts}{shared}"
