"""What a configuration costs by the cost model: the run, the plan that it is executed by, its hours on a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.flow.reuse import tail_of
from geoalign.flow.table import StepTable, StepWindow, build_step_table, has_exact_tail
from geoalign.perf.budget import Plan, RunCost, exact_plan
from geoalign.perf.cost import TransformerCost, VideoCost, video_cost
from geoalign.perf.devices import DeviceProfile
from geoalign.perf.memory import reward_models
from geoalign.rl.window import WindowSchedule
from geoalign.training.telemetry import walk_of


def run_cost(config: Config) -> RunCost:
    """The run of a configuration, all of it on its longest videos."""
    return _part(config, _iterations(config), config.data.num_frames)


def left_out(config: Config) -> list[str]:
    """Rewards that are counted as free, because no cost is known."""
    return reward_models(config)[1] if config.codec.kind == "wan_vae" else sorted(config.rewards)


def exactly(config: Config) -> Config:
    """The same run without anything that CHANGES it (``Config.changes``), and without audits; all else as it was."""
    for name, value in config.undone().items():
        config = _with(config, name.split("."), value)
    return config


def plan_with_levers(config: Config) -> Plan:
    """All EXACT levers that the run can have, and what else the configuration asks for."""
    learn = config.learn
    streams = config.optim.updates_per_rollout == 1 and learn.members is None
    plan = exact_plan(streams=streams, guidance=2 if config.flow.guidance > 1 else 1)
    plan = replace(plan, learned_steps=learn.window_steps, learned_members=learn.members)
    return plan.after_window(attention=config.ode.attention, linears=config.ode.linears != "exact")


def used_on(config: Config, device: DeviceProfile) -> Config:
    """What a run does of a configuration on a card: without 8-bit attention where it does not pay, nor audits of it."""
    if config.ode.attention == "exact" or device.pays(config.ode.attention):
        return config
    used = _with(config, ("ode", "attention"), "exact")
    return used if used.approximations() else _with(used, ("ode", "audit_every"), 0)


def hours(config: Config, device: DeviceProfile, devices: int) -> float:
    """Predicted hours with all EXACT levers and what the configuration asks for besides, its audits too."""
    used = used_on(config, device)
    return sum(run.hours(device, plan_with_levers(used), devices) for run in _runs(used))


def hours_at_low_end(config: Config, device: DeviceProfile, devices: int) -> float | None:
    """:func:`hours` at the low ends of modelled attention rates; None where they rest on none."""
    ranged = "attention" in device.ranges or (
        f"attention_{config.ode.attention}" in device.ranges and device.pays(config.ode.attention)
    )
    return hours(config, device.at_low_end(), devices) if ranged else None


def audit_cost(config: Config, device: DeviceProfile) -> tuple[int, float]:
    """Number of audits, and the predicted hours that :func:`hours` holds for them."""
    used = used_on(config, device)
    plan, runs = plan_with_levers(used), _runs(used)
    return sum(sum(run.audits.values()) for run in runs), sum(run.audit_seconds(device, plan) for run in runs) / 3600


def tail_cost(config: Config, device: DeviceProfile) -> float:
    """Predicted seconds of the steps after the window as a share of those of exact steps on the full grid.

    Iterations of a run that reuses steps which evaluate all of them, to measure the drift, count like the others.
    """
    seconds = []
    for each in (config, exactly(config)):
        steps = sum(walk_of(each, iteration.table).tail for iteration in _iterations(each))
        seconds.append(steps * run_cost(each).outside(device, plan_with_levers(each)))
    return seconds[0] / seconds[1]


@dataclass(frozen=True, slots=True)
class _Iteration:
    """What decides on the price of one iteration.

    Attributes:
        frames: of its videos.
        window, table: its steps.
        measures: it evaluates its tail whole to measure the drift of reuse.
        audited: a group is finished exactly too.
    """

    frames: int
    window: StepWindow
    table: StepTable
    measures: bool
    audited: bool


def _iterations(config: Config) -> list[_Iteration]:
    """The iterations of a run, as :class:`geoalign.training.trainer.Trainer` makes them.

    Without a file reuse measures its drift: once for every length of videos, and again behind a window that ends before
    all that were measured. Audits that fall on exact tails are made later.
    """
    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    tables: dict[StepWindow, StepTable] = {}
    measured, owed, found = (0, 0), False, []  # frames, and the end of the earliest window
    for iteration in range(config.train.iterations):
        window, frames = schedule(iteration), config.learn.frames(iteration, config.data.num_frames)
        if (table := tables.get(window)) is None:
            table = tables[window] = build_step_table(config.flow, window)
        reuses = measures_drift(config) and len(tail_of(table)) > 1
        measures = reuses and (frames != measured[0] or window.stop < measured[1])
        if measures:
            measured = (frames, window.stop)
        owed = owed or config.ode.audits(iteration)
        audited = owed and not measures and _approximates(config, table)
        owed = owed and not audited
        found.append(_Iteration(frames, window, table, measures, audited))
    return found


def measures_drift(config: Config) -> bool:
    """Whether an iteration evaluates all steps, to choose those that later ones reuse."""
    return config.ode.reuse != "off" and config.ode.reuse_profile is None


def _approximates(config: Config, table: StepTable) -> bool:
    """Whether an iteration that does not measure has other steps after its window than exact ones."""
    tail, ode = len(tail_of(table)), config.ode
    network = ode.attention != "exact" or ode.linears != "exact"
    return network or ode.evaluated(tail) < tail or not has_exact_tail(table, config.flow)


def _runs(config: Config) -> list[RunCost]:
    """The iterations of a run, together where their videos have equally many frames."""
    by_frames: dict[int, list[_Iteration]] = {}
    for iteration in _iterations(config):
        by_frames.setdefault(iteration.frames, []).append(iteration)
    return [_part(config, iterations, frames) for frames, iterations in by_frames.items()]


def _part(config: Config, iterations: Sequence[_Iteration], frames: int) -> RunCost:
    """Some iterations of a run, on videos of so many frames."""
    shape = (frames, *config.data.video[1:])
    walks = Counter(walk_of(config, each.table, 0 if each.measures else None) for each in iterations)
    audits = Counter(config.flow.steps - each.window.stop for each in iterations if each.audited)
    return RunCost(
        transformer=TransformerCost.of(config.model, *shape),
        video=_video(config, shape),
        walks=dict(walks),
        conditions=config.groups.conditions,
        group_size=config.groups.size,
        updates=config.optim.updates_per_rollout,
        audits=dict(audits),
    )


def _with(value: Any, path: Sequence[str], new: Any) -> Any:
    """A copy of a section or mapping whose setting at ``path`` is ``new``."""
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: _with(value[key], rest, new) if rest else new}
    return value.model_copy(update={key: _with(getattr(value, key), rest, new) if rest else new})


def _video(config: Config, shape: tuple[int, int, int]) -> VideoCost:
    if config.codec.kind != "wan_vae":
        return VideoCost(decode=0.0, encode=0.0, scorers={}, host_seconds=0.0)
    cost = video_cost(*shape, reward_models(config)[0])
    strides = [reward.options.get("frame_stride", 1) for reward in config.rewards.values() if reward.kind == "hpsv3"]
    if not strides:
        return cost
    if not isinstance(strides[0], int) or strides[0] < 1:
        raise ConfigError(f"frame_stride of the hpsv3 reward must be a whole number from 1, got {strides[0]!r}")
    seen = len(range(0, shape[0], strides[0])) / shape[0]
    return replace(cost, scorers=cost.scorers | {"hpsv3": cost.scorers["hpsv3"] * seen})
