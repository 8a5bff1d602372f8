"""What a configuration costs by the cost model: the run, the plan that it is executed by, its hours on a card."""

from __future__ import annotations

from collections import Counter

from geoalign.config.schema import Config
from geoalign.config.training import OdeConfig
from geoalign.flow.table import build_step_table
from geoalign.perf.budget import Plan, RunCost, Walk, exact_plan
from geoalign.perf.cost import TransformerCost, VideoCost, video_cost
from geoalign.perf.devices import DeviceProfile
from geoalign.perf.memory import reward_models
from geoalign.rl.window import WindowSchedule
from geoalign.training.telemetry import walk_of


def run_cost(config: Config) -> tuple[RunCost, list[str]]:
    """The run of a configuration, and the rewards without a model, which are counted as free."""
    video, left_out = _video(config)
    run = RunCost(
        transformer=TransformerCost.of(config.model, *config.data.video),
        video=video,
        walks=_walks(config),
        conditions=config.groups.conditions,
        group_size=config.groups.size,
        updates=config.optim.updates_per_rollout,
    )
    return run, left_out


def exactly(config: Config) -> Config:
    """The same run with exact steps on the full grid outside the window."""
    return config.model_copy(update={"flow": config.flow.with_exact_tail(), "ode": OdeConfig()})


def plan_with_levers(config: Config) -> Plan:
    """All EXACT levers that the run can have, and the 8-bit steps that it asks for."""
    plan = exact_plan(config.optim.updates_per_rollout, 2 if config.flow.guidance > 1 else 1)
    return plan.with_int8(attention=config.ode.attention != "exact", linears=config.ode.linears != "exact")


def price(config: Config, device: DeviceProfile) -> tuple[float, float]:
    """Cost of the tail as a share of the exact one's, and predicted hours on a card per condition, all levers on."""
    runs, plans = zip(*((run_cost(each)[0], plan_with_levers(each)) for each in (config, exactly(config))), strict=True)
    tails = [
        sum(times * walk.tail for walk, times in run.walks.items()) * run.outside(device, plan)
        for run, plan in zip(runs, plans, strict=True)
    ]
    return tails[0] / tails[1], runs[0].hours(device, plans[0], config.groups.conditions)


def _walks(config: Config) -> dict[Walk, int]:
    """Every iteration's evaluated steps, from the very schedule and table that training uses."""
    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    windows = Counter(schedule(iteration) for iteration in range(config.train.iterations))
    walks: Counter[Walk] = Counter()
    for window, count in windows.items():
        walks[walk_of(config, build_step_table(config.flow, window))] += count
    return dict(walks)


def _video(config: Config) -> tuple[VideoCost, list[str]]:
    if config.codec.kind != "wan_vae":
        return VideoCost(decode=0.0, encode=0.0, scorers={}, host_seconds=0.0), sorted(config.rewards)
    scorers, left_out = reward_models(config)
    return video_cost(*config.data.video, scorers), left_out
