"""What a configuration costs by the cost model: the run, the plan that it is executed by, its hours on a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from geoalign.config.schema import Config
from geoalign.config.training import LearnConfig, OdeConfig
from geoalign.flow.table import build_step_table
from geoalign.perf.budget import Plan, RunCost, Walk, exact_plan
from geoalign.perf.cost import TransformerCost, VideoCost, video_cost
from geoalign.perf.devices import DeviceProfile
from geoalign.perf.memory import reward_models
from geoalign.rl.window import WindowSchedule
from geoalign.training.telemetry import walk_of


def run_cost(config: Config, iterations: Iterable[int] | None = None, frames: int | None = None) -> RunCost:
    """The run of a configuration: all of its iterations on its longest videos, or some of them on shorter ones."""
    shape = (frames or config.data.num_frames, *config.data.video[1:])
    return RunCost(
        transformer=TransformerCost.of(config.model, *shape),
        video=_video(config, shape),
        walks=_walks(config, range(config.train.iterations) if iterations is None else iterations),
        conditions=config.groups.conditions,
        group_size=config.groups.size,
        updates=config.optim.updates_per_rollout,
    )


def left_out(config: Config) -> list[str]:
    """Rewards that are counted as free, because no cost is known."""
    return reward_models(config)[1] if config.codec.kind == "wan_vae" else sorted(config.rewards)


def exactly(config: Config) -> Config:
    """The same run without anything that CHANGES it: exact steps on the full grid, learning from all of them."""
    return config.model_copy(update={"flow": config.flow.with_exact_tail(), "ode": OdeConfig(), "learn": LearnConfig()})


def plan_with_levers(config: Config) -> Plan:
    """All EXACT levers that the run can have, and what else the configuration asks for."""
    learn = config.learn
    streams = config.optim.updates_per_rollout == 1 and learn.members is None
    plan = exact_plan(streams=streams, guidance=2 if config.flow.guidance > 1 else 1)
    plan = replace(plan, learned_steps=learn.window_steps, learned_members=learn.members)
    return plan.with_int8(attention=config.ode.attention != "exact", linears=config.ode.linears != "exact")


def hours(config: Config, device: DeviceProfile, devices: int) -> float:
    """Predicted hours with all EXACT levers and what the configuration asks for besides."""
    plan, total = plan_with_levers(config), 0.0
    by_frames: dict[int, list[int]] = {}
    for iteration in range(config.train.iterations):
        by_frames.setdefault(config.learn.frames(iteration, config.data.num_frames), []).append(iteration)
    for frames, iterations in by_frames.items():
        total += run_cost(config, iterations, frames).hours(device, plan, devices)
    return total


def tail_cost(config: Config, device: DeviceProfile) -> float:
    """Predicted seconds of the steps after the window as a share of those of exact steps on the full grid."""
    seconds = []
    for each in (config, exactly(config)):
        run = run_cost(each)
        steps = sum(times * walk.tail for walk, times in run.walks.items())
        seconds.append(steps * run.outside(device, plan_with_levers(each)))
    return seconds[0] / seconds[1]


def _walks(config: Config, iterations: Iterable[int]) -> dict[Walk, int]:
    """The evaluated steps of some iterations, from the very schedule and table that training uses."""
    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    walks: Counter[Walk] = Counter()
    for window, count in Counter(schedule(iteration) for iteration in iterations).items():
        walks[walk_of(config, build_step_table(config.flow, window))] += count
    return dict(walks)


def _video(config: Config, shape: tuple[int, int, int]) -> VideoCost:
    if config.codec.kind != "wan_vae":
        return VideoCost(decode=0.0, encode=0.0, scorers={}, host_seconds=0.0)
    cost = video_cost(*shape, reward_models(config)[0])
    strides = [reward.options.get("frame_stride", 1) for reward in config.rewards.values() if reward.kind == "hpsv3"]
    if not strides:
        return cost
    seen = len(range(0, shape[0], strides[0])) / shape[0]
    return replace(cost, scorers=cost.scorers | {"hpsv3": cost.scorers["hpsv3"] * seen})
