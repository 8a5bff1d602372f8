"""``geoalign budget``: how long a configuration would take on data-centre GPUs, and what every speed-up is worth."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, add_json, check_json, read_config, write_json
from geoalign.config.schema import Config
from geoalign.errors import DataError, UsageError
from geoalign.files.parsing import parse_json, read_text
from geoalign.jobs.ladder import PricedRung, measured, measured_elsewhere, priced_rungs, without_fidelity
from geoalign.jobs.pricing import audit_cost, exactly, hours, hours_at_low_end, left_out, run_cost, used_on
from geoalign.perf.budget import Ladder, Plan, RunCost, climb, exact_plan
from geoalign.perf.devices import DEVICES, INT8_WORTH, DeviceProfile, core_rates, cores_measured, profile_of

QUANTISED = ("int8", "int8_fp8")
"""Modes of ``ode.attention`` beside the exact one."""
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
EXACT levers keep algorithm and distribution. CHANGES rungs do not and are off by default: each is priced alone, on top
of the EXACT levers, beside its fidelity on the embedded policy (`geoalign fidelity run` measures it on yours). They are
not added up; pairs that were measured together are rungs of their own."""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add the verb ``budget``."""
    parser = subparsers.add_parser(
        "budget",
        description=f"{summary}; on data-centre GPUs.",
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
    exact = exactly(config)
    guidance = 2 if config.flow.guidance > 1 else 1
    named = config.run.attention if config.run.attention in core_rates(DEVICES[args.device].target) else None
    run = run_cost(exact)
    profile, cores = _profile(
        args, named, lambda card: run.hours(card, exact_plan(streams=run.updates == 1, guidance=guidance), devices)
    )
    ladder = climb(run, profile, devices, guidance)
    numbers = _numbers(run, ladder, profile, devices, guidance) | {"cores_measured": cores}
    numbers["changes"] = [_changes(rung) for rung in priced_rungs(args.config, args.overrides, profile, devices)]
    if config.changes():
        numbers["as_configured"] = _as_configured(config, profile, devices)
    if write_json(args, numbers):
        print(_text(numbers, ladder, args.config, left_out(config)))
    return 0


def _profile(
    args: argparse.Namespace, named: str | None, hours_on: Callable[[DeviceProfile], float]
) -> tuple[DeviceProfile, list[str]]:
    """The card with the core and the measurements that the command line names, and the cores measured there.

    Without a core by name, one that was measured: the one of fewest hours.
    """
    profile, core, results = DEVICES[args.device], args.core or named, args.results
    known = core_rates(profile.target)
    found: list[str] = []
    rows: list[Any] = []
    if results is not None:
        with _of_results(results):
            rows = [parse_json(line, results) for line in read_text(results).split("\n") if line.strip()]
            card = profile_of(str(rows[0].get("device", ""))) if rows and isinstance(rows[0], dict) else None
            if card is None or card.target != profile.target:
                raise UsageError(
                    f"--results {results}: its first line does not name a card like --device {args.device}"
                )
            found = cores_measured(rows[1:], profile.target)
    if core is not None and found and core not in found:
        raise UsageError(f"--results {results}: {core} was not measured there; name one that was: --core {found[0]}")
    if core is not None and not found and core not in known:
        raise UsageError(f"--core {core}: rates are known of {', '.join(known)} on {profile.name}")
    chosen = [replace(profile.with_core(name), core=name) for name in ([core] if core else found or [profile.core])]
    if results is not None:
        with _of_results(results):
            chosen = [each.measured(rows[1:]) for each in chosen]
    return min(chosen, key=hours_on), found


@contextlib.contextmanager
def _of_results(path: Path) -> Iterator[None]:
    """Lines of another form end in one line of text."""
    try:
        yield
    except (DataError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = str(error) if isinstance(error, DataError) else repr(error)
        raise UsageError(f"--results {path}: not a result file of `make gpu` ({told})") from error


def _numbers(run: RunCost, ladder: Ladder, profile: DeviceProfile, devices: int, guidance: int) -> dict[str, Any]:
    start = Plan(guidance=guidance)
    phases = run.seconds(profile, start)
    passes = [(count, run.walks[walk]) for walk, count in run.passes(start).items()]
    return {
        "predicted": True,
        "device": profile.name,
        "core": profile.core,
        "rates": {
            name: {"tera_per_s": getattr(profile, name) / 1e12, "kind": kind}
            | ({"low": own.low / 1e12, "high": own.high / 1e12} if (own := profile.ranges.get(name)) else {})
            for name, kind in profile.kinds.items()
            if getattr(profile, name) is not None
        },
        "quantised": {mode: {"used": profile.pays(mode), "gain": _gain(profile, mode)} for mode in QUANTISED},
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
            "exact": ladder.total,
        },
        "ladder": [
            {
                "lever": rung.lever.name,
                "kind": "EXACT",
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
        *_core(numbers),
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
        f"  {rung.lever.name:<48}{'EXACT':<9}{_hours(rung.alone_hours):>10}{rung.alone_kind:>15}"
        f"{_hours(rung.cumulative_hours):>10}{rung.cumulative_kind:>15}"
        for rung in ladder.rungs
    ]
    lines += [
        "",
        f"  EXACT levers together: {_hours(hours['exact'])}  (x{hours['reference'] / hours['exact']:.2f})",
        "",
    ]
    lines.append(
        f"  {'with them, one CHANGES rung at a time':<57}{'hours':>14}{'rests on':>15}  fidelity on the embedded policy"
    )
    lines += [
        f"  {rung['rung']:<48}{'CHANGES':<9}{_span(rung):>14}{rung['rests_on']:>15}  {_fidelity(rung)}"
        for rung in numbers["changes"]
    ]
    lines += [
        f"  {mode} attention is left out: {found['gain']}"
        for mode, found in numbers["quantised"].items()
        if not found["used"]
    ]
    if any(rung["hours_at_low_end"] for rung in numbers["changes"]):
        lines.append("  two hours: at the expected rate of our own attention kernels, and at its low end")
    if own := numbers.get("as_configured"):
        named = ", ".join(f"{key}={value}" for key, value in own["settings"].items())
        lines += ["", f"  as configured: {_span(own)} with {named}"]
        if own["not_used"]:
            lines.append(f"  not used on this card, where it does not pay: {', '.join(own['not_used'])}")
        if own["audits"]:
            lines.append(
                f"  of that, audits: {_hours(own['audit_hours'])} (in {own['audits']} iterations the device that holds "
                "one group finishes it exactly too, and the others wait)"
            )
        if len(own["not_used"]) < len(own["settings"]):
            lines.append(f"  fidelity of them together: {_fidelity(own)}")
        if not own["videos"]:
            lines.append("  assumed to hold on other weights until `geoalign fidelity run` has measured it there")
    return "\n".join(lines)


def _gain(profile: DeviceProfile, mode: str) -> str:
    """What a quantised mode is worth, and what it would have to be."""
    exists = profile.rate_of(mode) is not None
    return profile.gain(mode) + (f"; {INT8_WORTH} wanted" if exists and not profile.pays(mode) else "")


def _core(numbers: dict[str, Any]) -> list[str]:
    """Which cores a result file offered, where it did."""
    cores = numbers["cores_measured"]
    return [f"  exact cores measured at full length: {', '.join(cores)}"] if cores else []


def _rates(numbers: dict[str, Any]) -> list[str]:
    """The rates behind the seconds, by their kind."""
    by_kind: dict[str, list[str]] = {}
    for name, rate in numbers["rates"].items():
        told = f"{name.replace('_', ' ')} {rate['tera_per_s']:.3g}"
        ends = f" ({rate['low']:.3g} to {rate['high']:.3g})" if "low" in rate else ""
        by_kind.setdefault(rate["kind"], []).append(told + ends)
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in by_kind.items()]
    return ["  rates in TFLOP/s, bandwidth in TB/s; of the whole, attention decides most", *lines]


def _changes(priced: PricedRung) -> dict[str, Any]:
    return {
        "rung": priced.rung.name,
        "settings": priced.settings,
        "hours": priced.hours,
        "hours_at_low_end": priced.low_end_hours,
        "rests_on": priced.kind,
        **_of_videos(priced.config),
    }


def _as_configured(config: Config, device: DeviceProfile, devices: int) -> dict[str, Any]:
    audits, audit_hours = audit_cost(config, device)
    used = used_on(config, device)
    return {
        "settings": config.changes(),
        "not_used": sorted(config.changes().keys() - used.changes().keys()),
        "hours": hours(config, device, devices),
        "hours_at_low_end": hours_at_low_end(config, device, devices),
        "audits": audits,
        "audit_hours": audit_hours,
        **_of_videos(used),
    }


def _of_videos(config: Config) -> dict[str, Any]:
    """Whether the sampled videos are others, how faithful those of approximate steps are, or why nothing tells it."""
    return {
        "changes_videos": bool(config.approximations()) or config.learn.short_frames is not None,
        "videos": without_fidelity(config),
        "fidelity": measured(config),
        "fidelity_elsewhere": measured_elsewhere(config),
    }


def _fidelity(rung: Mapping[str, Any]) -> str:
    """What is known of the order inside groups, in a few words."""
    if rung["videos"]:
        return str(rung["videos"])
    found = rung["fidelity"]
    if found is None:
        return f"measured at {elsewhere} only" if (elsewhere := rung["fidelity_elsewhere"]) else "not measured"
    told = (
        f"Spearman {found['spearman']:.3f}, p10 {found['spearman_p10']:.2f}, signs changed {100 * found['flips']:.1f} %"
    )
    told += f", windows {_listed(found['windows'])}" + ("" if found["accepted"] else "; not accepted")
    return told + (f"; not measured at windows {_listed(later, ' to ')}" if (later := found["later_windows"]) else "")


def _listed(starts: Sequence[int], between: str = ", ") -> str:
    return between.join(map(str, starts))


def _span(priced: Mapping[str, Any]) -> str:
    """Hours, and those at the low end of a modelled rate where they rest on one."""
    low = priced["hours_at_low_end"]
    return _hours(priced["hours"]) if low is None else f"{priced['hours']:.1f} to {_hours(low)}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else f"{3600 * hours:.2g} s"
