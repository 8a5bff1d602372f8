"""The CHANGES rungs of the ladder: what each would make of a run's hours, and how faithful it was measured to be.

Rungs are not added up: what two approximations do together is known only where they were measured together, which is a
rung of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.jobs.pricing import exactly, hours, hours_at_low_end, run_cost
from geoalign.perf.budget import climb
from geoalign.perf.devices import CERTAINTY, DeviceProfile, Kind
from geoalign.rl.window import WindowSchedule

REUSE, SIGMA, INT8 = (
    "ode.reuse=residual ode.reuse_share=",
    "flow.tail_grid=sigma flow.tail_steps=",
    "ode.attention=int8",
)

SAMPLER = {
    "steps": "T = {}",
    "shift": "shift {:g}",
    "sde": "{} SDE",
    "eta": "eta {:g}",
    "eta_by_step": "eta by step {}",
    "guidance": "guidance {:g}",
    "t_dtype": "timesteps in {}",
}
"""Settings of ``flow`` that a row of the fidelity table speaks of alone, and how they are told."""


@dataclass(frozen=True, slots=True)
class Rung:
    """Settings that CHANGE a run, and the rate of a device profile that their worth rests on."""

    name: str
    settings: str
    rate: str = "attention"


RUNGS = (
    Rung("int8 attention after the window", INT8, rate="attention_int8"),
    Rung("int8 attention, values in fp8 too", "ode.attention=int8_fp8", rate="attention_int8_fp8"),
    Rung("int8 frozen linears after the window", "ode.linears=int8", rate="matmul_int8"),
    Rung("40 % of the time grid (MixGRPO-Flash)", "flow.tail_ratio=0.4 flow.tail_solver=dpm2m"),
    Rung("8 steps by sigma", f"{SIGMA}8"),
    Rung("8 steps by sigma, int8", f"{SIGMA}8 {INT8}", rate="attention_int8"),
    Rung("5 steps by sigma, second order", f"{SIGMA}5 flow.tail_solver=dpm2m"),
    Rung("5 steps by sigma, second order, int8", f"{SIGMA}5 flow.tail_solver=dpm2m {INT8}", rate="attention_int8"),
    Rung("45 % of the steps, others reuse", f"{REUSE}0.45"),
    Rung("30 % of the steps, others reuse", f"{REUSE}0.3"),
    Rung("45 % of the steps, others reuse, int8", f"{REUSE}0.45 {INT8}", rate="attention_int8"),
    Rung("30 % of the steps, others reuse, int8", f"{REUSE}0.3 {INT8}", rate="attention_int8"),
    Rung("gradients of a random half of the window", "learn.window_steps={half_window}"),
    Rung("the most telling half of the members", "learn.members={half_group} levers.streaming=off"),
    Rung("49 frames in half of the iterations", "learn.short_frames=49 learn.short_iterations={half_run}"),
    Rung("HPSv3 on every fourth frame", "rewards.hpsv3.options.frame_stride=4", rate="reward"),
)
"""What a reader may want to try, each alone; and pairs that the fidelity table holds together."""


@dataclass(frozen=True, slots=True)
class PricedRung:
    """A rung on a run: its settings there and what they make of it, predicted hours with all EXACT levers and it alone,
    and how well founded these are.

    ``low_end_hours``: at the low ends of modelled attention rates; None where the hours rest on none.
    """

    rung: Rung
    settings: str
    config: Config
    hours: float
    low_end_hours: float | None
    kind: Kind


def priced_rungs(name: str, overrides: Sequence[str], device: DeviceProfile, devices: int) -> list[PricedRung]:
    """Every rung that the run can have, on top of its exact form."""
    base = load_config(Config, name, overrides)
    halves = {
        "half_window": max(1, base.window.size // 2),
        "half_group": max(1, base.groups.size // 2),
        "half_run": base.train.iterations // 2,
    }
    founded = climb(run_cost(exactly(base)), device, devices).rungs[-1].cumulative_kind
    found = []
    for rung in RUNGS:
        settings = rung.settings.format(**halves)
        try:
            config = load_config(Config, name, [*overrides, *undone(base), *settings.split()])
        except ConfigError:  # of a reward that the run does not have, or frames that it cannot
            continue
        if rung.rate.startswith("attention_") and not device.pays(config.ode.attention):
            continue
        # On top of all EXACT levers, so no better founded than the least founded of them.
        kind = max(founded, device.kinds.get(rung.rate, "assumed"), key=CERTAINTY.index)
        spent, low_end = hours(config, device, devices), hours_at_low_end(config, device, devices)
        found.append(PricedRung(rung, settings, config, spent, low_end, kind))
    return found


def without_fidelity(config: Config) -> str:
    """What is said of the videos of a run whose steps are all exact, and of what it changes instead.

    Empty where steps are approximated: fidelity then speaks of them.
    """
    if config.approximations():
        return ""
    changed = config.changes()
    reward = [name for name in changed if name.startswith("rewards.")]
    what = "a reward" if len(reward) == len(changed) else "what is learned"
    if config.learn.short_frames is None:
        return f"videos as before; changes {what}"
    shorter = f"{config.learn.short_iterations} of {config.train.iterations} iterations"
    return f"shorter videos in {shorter}, of which fidelity says nothing; changes what is learned"


def measured(config: Config) -> dict[str, Any] | None:
    """The worst of the rows of the fidelity table with the approximations and the sampler of ``config``.

    Behind windows that the run reaches, if any was measured. None: there is no such row, or nothing is approximated.
    """
    rows = [row for row in _rows_of(config) if _sampler(row) == _own_sampler(config)]
    if not rows:
        return None
    last = max(_starts(config))
    rows = [row for row in rows if row["window"] <= last] or rows
    worst = min(rows, key=lambda row: row["spearman"])
    return {
        "spearman": worst["spearman"],
        "spearman_p10": min(row["spearman_p10"] for row in rows),
        "flips": max(row["flips"] for row in rows),
        "rows": len(rows),
        "windows": sorted({row["window"] for row in rows}),
        "later_windows": later_windows(config, max(row["window"] for row in rows)),
        "accepted": all(row["accepted"] for row in rows),
    }


def later_windows(config: Config, start: int) -> list[int]:
    """Starts of the windows of a run behind ``start``: first and last, or none."""
    later = {each for each in _starts(config) if each > start}
    return sorted({min(later), max(later)}) if later else []


def _starts(config: Config) -> set[int]:
    """Starts of the windows of a run."""
    windows = WindowSchedule(config.window, config.flow.steps, config.run.seed)
    return {windows(iteration).start for iteration in range(config.train.iterations)}


def measured_elsewhere(config: Config) -> str:
    """What tells the samplers that the approximations of ``config`` were measured with from its own.

    Empty: they were measured with its own, or not at all.
    """
    own = _own_sampler(config)
    others = [sampler for row in _rows_of(config) if (sampler := _sampler(row)) is not None]
    if own in others:
        return ""
    told = []
    for other in others:
        pairs = zip(SAMPLER.values(), other, own, strict=True)
        told.append(", ".join(word.format(theirs) for word, theirs, mine in pairs if theirs != mine))
    return " or ".join(dict.fromkeys(told))


def fidelity_rows() -> list[dict[str, Any]]:
    """The table that ships with the package, made on the embedded policy; empty before it was made."""
    file = resources.files("geoalign").joinpath("_assets", "fidelity.json")
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def undone(config: Config) -> list[str]:
    """Overrides that take back what ``config`` CHANGES."""
    return [f"{name}={'null' if value is None else value}" for name, value in config.undone().items()]


def _rows_of(config: Config) -> list[dict[str, Any]]:
    """Rows of the fidelity table with exactly the approximations of ``config``, under any sampler; none without any."""
    wanted = {name: str(value) for name, value in config.approximations().items()}
    return [row for row in fidelity_rows() if row["ladder"] and row["approximations"] == wanted] if wanted else []


def _own_sampler(config: Config) -> tuple[Any, ...]:
    return _comparable(getattr(config.flow, name) for name in SAMPLER)


def _sampler(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a row was measured with; None where it does not say."""
    return _comparable(row[name] for name in SAMPLER) if SAMPLER.keys() <= row.keys() else None


def _comparable(values: Iterable[Any]) -> tuple[Any, ...]:
    """Files hold lists where configurations hold tuples."""
    return tuple(list(value) if isinstance(value, tuple) else value for value in values)
