"""What a configuration costs by the cost model: the run, the plan that it is executed by, its hours on a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.perf.budget import Plan, RunCost, Walk, exact_plan
from geoalign.perf.cost import TransformerCost, VideoCost, video_cost
from geoalign.perf.devices import DeviceProfile
from geoalign.perf.memory import reward_models
from geoalign.rl.window import WindowSchedule
from geoalign.training.telemetry import walk_of


def run_cost(config: Config, iterations: Iterable[int] | None = None, frames: int | None = None) -> RunCost:
    """The run of a configuration: all of its iterations on its longest videos, or some of them on shorter ones."""
    shape = (frames or config.data.num_frames, *config.data.video[1:])
    iterations = range(config.train.iterations) if iterations is None else tuple(iterations)
    return RunCost(
        transformer=TransformerCost.of(config.model, *shape),
        video=_video(config, shape),
        walks=_walks(config, iterations),
        conditions=config.groups.conditions,
        group_size=config.groups.size,
        updates=config.optim.updates_per_rollout,
        audits=_audits(config, iterations),
    )


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


def hours(config: Config, device: DeviceProfile, devices: int) -> float:
    """Predicted hours with all EXACT levers and what the configuration asks for besides, its audits too."""
    plan = plan_with_levers(config)
    return sum(run.hours(device, plan, devices) for run in _runs(config))


def hours_at_low_end(config: Config, device: DeviceProfile, devices: int) -> float | None:
    """:func:`hours` at the low ends of modelled attention rates; None where they rest on none."""
    ranged = "attention" in device.ranges or (
        f"attention_{config.ode.attention}" in device.ranges and device.pays(config.ode.attention)
    )
    return hours(config, device.at_low_end(), devices) if ranged else None


def audit_cost(config: Config, device: DeviceProfile) -> tuple[int, float]:
    """Number of audits, and the predicted hours that :func:`hours` holds for them."""
    plan, runs = plan_with_levers(config), _runs(config)
    return sum(sum(run.audits.values()) for run in runs), sum(run.audit_seconds(device, plan) for run in runs) / 3600


def tail_cost(config: Config, device: DeviceProfile) -> float:
    """Predicted seconds of the steps after the window as a share of those of exact steps on the full grid.

    The first iteration of a run that reuses steps, which may evaluate all of them, counts like the others.
    """
    seconds = []
    for each in (config, exactly(config)):
        windows = _windows(each, range(each.train.iterations))
        steps = sum(
            times * walk_of(each, build_step_table(each.flow, window)).tail for window, times in windows.items()
        )
        seconds.append(steps * run_cost(each).outside(device, plan_with_levers(each)))
    return seconds[0] / seconds[1]


def _runs(config: Config) -> list[RunCost]:
    """The iterations of a run, together where their videos have equally many frames."""
    by_frames: dict[int, list[int]] = {}
    for iteration in range(config.train.iterations):
        by_frames.setdefault(config.learn.frames(iteration, config.data.num_frames), []).append(iteration)
    return [run_cost(config, iterations, frames) for frames, iterations in by_frames.items()]


def _walks(config: Config, iterations: Sequence[int]) -> dict[Walk, int]:
    """The evaluated steps of some iterations, from the very schedule and table that training uses."""
    # The first iteration of each length evaluates all steps where it measures the drift that chooses reused ones.
    first = iterations[:1] if measures_drift(config) else ()
    walks: Counter[Walk] = Counter()
    for some, reused in ((first, 0), ([each for each in iterations if each not in first], None)):
        for window, count in _windows(config, some).items():
            walks[walk_of(config, build_step_table(config.flow, window), reused)] += count
    return dict(walks)


def measures_drift(config: Config) -> bool:
    """Whether the first iteration evaluates all steps, to choose those that later ones reuse."""
    return config.ode.reuse != "off" and config.ode.reuse_profile is None


def _audits(config: Config, iterations: Iterable[int]) -> dict[int, int]:
    """Exact steps after the window -> the audits among some iterations that take them."""
    due = _windows(config, filter(config.ode.audits, iterations))
    counts: Counter[int] = Counter()
    for window, count in due.items():
        counts[config.flow.steps - window.stop] += count
    return dict(counts)


def _windows(config: Config, iterations: Iterable[int]) -> Counter[StepWindow]:
    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    return Counter(schedule(iteration) for iteration in iterations)


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
