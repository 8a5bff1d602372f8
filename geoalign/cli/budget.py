"""``geoalign budget``: how long a configuration would take on data-centre GPUs, and what every speed-up is worth."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, add_json, check_json, read_config, write_json
from geoalign.errors import DataError, UsageError
from geoalign.files.parsing import parse_json, read_text
from geoalign.perf.budget import Ladder, Plan, RunCost, Walk, climb
from geoalign.perf.cost import TransformerCost, VideoCost, video_cost
from geoalign.perf.devices import DEVICES, INT8_WORTH, DeviceProfile, core_rates, profile_of
from geoalign.perf.memory import reward_models

if TYPE_CHECKING:
    from geoalign.config.schema import Config

COARSE_TAIL = 0.4
"""Share of the time grid kept after the window by the ladder's tail rung, where the configuration names none."""

LAUNCH_BOUND_S = 0.05
"""Below this, the launches of one forward (a few thousand at some microseconds) take longer than its work."""

EXAMPLES = """\
examples:
  geoalign budget --config paper_64xa800                hours on 64 A800, lever by lever
  geoalign budget --config paper_64xa800 --device h200 --devices 32
  geoalign budget --config paper_64xa800 optim.updates_per_rollout=4 levers.streaming=off
  geoalign budget --config node_8gpu --json budget.json
  geoalign budget --config paper_64xa800 --device h200 --core sdpa_flash
  geoalign budget --config paper_64xa800 --device h200 --results profiling/results/FILE.jsonl

All numbers are predictions from rates of the device; each carries the kind of the rate it rests on: measured here (by
`make gpu`, with --results), published for that very kernel, modelled from our compiled kernels, or assumed.
EXACT levers keep algorithm and distribution; CHANGES levers do not, and are off by default."""


def add_parser(subparsers: Any) -> None:
    """Add the verb ``budget``."""
    parser = subparsers.add_parser(
        "budget",
        help="predicted hours of a configuration and the lever ladder",
        description="How long a configuration would take on data-centre GPUs, and what every speed-up is worth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument("--device", choices=sorted(DEVICES), default="a800", help="device profile (default: a800)")
    parser.add_argument("--core", help="exact attention core (default: run.attention, else the one chosen there)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="result file of `make gpu` on such a card")
    parser.add_argument("--devices", type=int, metavar="N", help="number of devices (default: one per condition)")
    add_json(parser, "the numbers")
    parser.set_defaults(run=run_budget)


def run_budget(args: argparse.Namespace) -> int:
    """Print the prediction; returns the exit code."""
    config = read_config(args)
    devices = config.groups.conditions if args.devices is None else args.devices
    if not 1 <= devices <= config.groups.conditions:
        raise UsageError(
            f"--devices {devices}: the prediction places whole groups, so 1 to {config.groups.conditions} devices "
            "(groups.conditions) can be used"
        )
    check_json(args)
    run, coarse, left_out = describe(config)
    guidance = 2 if config.flow.guidance > 1 else 1
    named = config.run.attention if config.run.attention in core_rates(DEVICES[args.device].target) else None
    profile = _profile(args.device, args.core or named, args.results)
    ladder = climb(run, coarse, profile, devices, guidance)
    numbers = _numbers(run, coarse, ladder, profile, devices, guidance)
    if write_json(args, numbers):
        print(_text(numbers, ladder, args.config, left_out))
    return 0


def _profile(device: str, core: str | None, results: Path | None) -> DeviceProfile:
    """The card with the core and the measurements that the command line names."""
    profile = DEVICES[device]
    known = core_rates(profile.target)
    if core is not None and core not in known:
        raise UsageError(f"--core {core}: rates are known of {', '.join(known)} on {profile.name}")
    profile = profile.with_core(core or profile.core)
    if results is None:
        return profile
    try:
        rows = [parse_json(line, results) for line in read_text(results).split("\n") if line.strip()]
    except DataError as error:
        raise UsageError(f"--results {results}: not a result file of `make gpu` ({error})") from error
    measured = profile_of(str(rows[0].get("device", ""))) if rows and isinstance(rows[0], dict) else None
    if measured is None or measured.target != profile.target:
        raise UsageError(f"--results {results}: its first line does not name a card like --device {device}")
    return profile.measured(rows[1:])


def describe(config: Config) -> tuple[RunCost, RunCost, list[str]]:
    """The run of a configuration on the full grid, the same with the coarser tail, and the rewards without a model."""
    transformer = TransformerCost.of(config.model, *config.data.video)
    video, left_out = _video(config)
    ratio = config.flow.tail_ratio if config.flow.tail_ratio < 1 else COARSE_TAIL
    full, coarse = (
        RunCost(
            transformer=transformer,
            video=video,
            walks=_walks(config, tail_ratio),
            conditions=config.groups.conditions,
            group_size=config.groups.size,
            updates=config.optim.updates_per_rollout,
        )
        for tail_ratio in (1.0, ratio)
    )
    return full, coarse, left_out


def _walks(config: Config, tail_ratio: float) -> dict[Walk, int]:
    """Every iteration's steps, from the very schedule and table that training uses."""
    from geoalign.flow.table import build_step_table
    from geoalign.rl.window import WindowSchedule

    schedule = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    windows = Counter(schedule(iteration) for iteration in range(config.train.iterations))
    flow = config.flow.model_copy(update={"tail_ratio": tail_ratio})
    walks: Counter[Walk] = Counter()
    for window, count in windows.items():
        tail = build_step_table(flow, window).num_steps - window.stop
        walks[Walk(window.start, window.size, tail)] += count
    return dict(walks)


def _video(config: Config) -> tuple[VideoCost, list[str]]:
    if config.codec.kind != "wan_vae":
        return VideoCost(decode=0.0, encode=0.0, scorers={}, host_seconds=0.0), sorted(config.rewards)
    scorers, left_out = reward_models(config)
    return video_cost(*config.data.video, scorers), left_out


def _numbers(
    run: RunCost, coarse: RunCost, ladder: Ladder, profile: DeviceProfile, devices: int, guidance: int
) -> dict[str, Any]:
    start = Plan(guidance=guidance)
    phases = run.seconds(profile, start)
    passes = [(count, run.walks[walk]) for walk, count in run.passes(start).items()]
    return {
        "predicted": True,
        "device": profile.name,
        "core": profile.core,
        "rates": {
            name: {"tera_per_s": getattr(profile, name) / 1e12, "kind": kind}
            for name, kind in profile.kinds.items()
            if getattr(profile, name) is not None
        },
        "int8_used": profile.int8_pays(),
        "devices": devices,
        "tokens": run.transformer.tokens,
        "forward_tflop": run.transformer.forward_flops() / 1e12,
        "forward_s": run.transformer.forward(profile, start.speedups).total,
        "backward_s": run.transformer.backward(profile, start.speedups).total,
        "iterations": run.iterations,
        "conditions": run.conditions,
        "group_size": run.group_size,
        "updates_per_rollout": run.updates,
        "forwards_per_iteration": sum(count.forwards * times for count, times in passes) / run.iterations,
        "backwards_per_iteration": sum(count.backward * times for count, times in passes) / run.iterations,
        "share": {
            "rollout": phases.rollout / phases.total,
            "learner": phases.learner / phases.total,
            "reward": phases.reward / phases.total,
            "other": phases.other / phases.total,
        },
        "hours": {
            "reference": ladder.reference_hours,
            "exact": ladder.total("EXACT"),
            "changes": ladder.total("CHANGES"),
        },
        "coarse_tail_steps": {walk.prefix: walk.tail for walk in coarse.walks},
        "ladder": [
            {
                "lever": rung.lever.name,
                "kind": rung.lever.kind,
                "alone_h": rung.alone_hours,
                "cumulative_h": rung.cumulative_hours,
                "alone_rests_on": rung.alone_kind,
                "cumulative_rests_on": rung.cumulative_kind,
            }
            for rung in ladder.rungs
        ],
    }


def _text(numbers: dict[str, Any], ladder: Ladder, name: str, left_out: list[str]) -> str:
    share, hours = numbers["share"], numbers["hours"]
    lines = [
        f"{name} on {numbers['devices']} x {numbers['device']}, attention by {numbers['core']} "
        "(all seconds and hours are predicted)",
        "",
        *_rates(numbers),
        f"  {numbers['iterations']} iterations of {numbers['conditions']} conditions x {numbers['group_size']} "
        f"rollouts, {numbers['updates_per_rollout']} optimizer update(s) each",
        f"  {numbers['tokens']:,} tokens: {numbers['forward_tflop']:.3g} TFLOP and {numbers['forward_s']:.3g} s a "
        f"forward, {numbers['backward_s']:.3g} s a backward",
        f"  {numbers['forwards_per_iteration']:,.0f} forwards and {numbers['backwards_per_iteration']:,.0f} backwards "
        "an iteration without levers",
        "  of the time: " + ", ".join(f"{phase} {100 * part:.0f} %" for phase, part in share.items()),
    ]
    if numbers["forward_s"] < LAUNCH_BOUND_S:
        lines.append("  so small a model waits for kernel launches: read the ratios of the counts, not the seconds")
    if left_out:
        lines.append(f"  counted as free, because no cost is known: rewards {', '.join(left_out)}")
    lines += ["", f"  {'lever':<48}{'kind':<9}{'alone':>10}{'rests on':>15}{'so far':>10}{'rests on':>15}"]
    basis = numbers["rates"]["attention"]["kind"]
    lines.append(f"  {'none: eager kernels, nothing shared':<57}{'':>25}{_hours(hours['reference']):>10}{basis:>15}")
    lines += [
        f"  {rung.lever.name:<48}{rung.lever.kind:<9}{_hours(rung.alone_hours):>10}{rung.alone_kind:>15}"
        f"{_hours(rung.cumulative_hours):>10}{rung.cumulative_kind:>15}"
        for rung in ladder.rungs
    ]
    if not numbers["int8_used"]:
        lines.append(f"  int8 attention is left out: not {INT8_WORTH} times as fast as {numbers['core']} here")
    lines += [
        "",
        f"  EXACT levers together:        {_hours(hours['exact'])}  (x{hours['reference'] / hours['exact']:.2f})",
        f"  with the CHANGES levers too:  {_hours(hours['changes'])}  (x{hours['reference'] / hours['changes']:.2f})",
    ]
    return "\n".join(lines)


def _rates(numbers: dict[str, Any]) -> list[str]:
    """The rates behind the seconds, by their kind."""
    by_kind: dict[str, list[str]] = {}
    for name, rate in numbers["rates"].items():
        by_kind.setdefault(rate["kind"], []).append(f"{name.replace('_', ' ')} {rate['tera_per_s']:.3g}")
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in by_kind.items()]
    return ["  rates in TFLOP/s, bandwidth in TB/s; of the whole, attention decides most", *lines]


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else f"{3600 * hours:.2g} s"
