"""``geoalign fidelity``: what approximate tails do to a group, and which of their steps to evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, read_config, whole
from geoalign.errors import DataError, RunError, UsageError

if TYPE_CHECKING:
    from geoalign.config.schema import Config
    from geoalign.data.source import RetakeDataset
    from geoalign.jobs.fidelity import Record, Setting

EXAMPLES = """\
examples:
  geoalign fidelity run --config bench_levers groups.conditions=8 groups.size=16 --groups 16 --json fidelity.json \\
      --setting "flow.tail_grid=sigma flow.tail_steps=9" --setting "ode.reuse=residual ode.reuse_share=0.4"
  geoalign fidelity run --config paper_64xa800_fast groups.conditions=16 --groups 16 --json real.json
  geoalign fidelity choose --config paper_64xa800 groups.conditions=1 ode.reuse=residual --out drift.json

The policy is train.base of the configuration. Settings may change flow.tail_*, ode.*, and as controls run.dtype and
rewards.*, each from the exact form of the configuration, whose own approximations are measured as the first setting
where no other is named. Settings that are not measured together are not added up. Take as many groups.conditions as
memory allows: advantage.std=batch_max divides by the largest deviation among them. A run that was stopped goes on from
its JSON; several GPUs share the work by --window, with a file each."""

DEFAULT_SETTINGS = (
    "run.dtype=bfloat16",
    "flow.tail_solver=dpm2m",
    "ode.attention=int8",
    "flow.tail_ratio=0.4 flow.tail_solver=dpm2m",
    "flow.tail_grid=sigma flow.tail_steps=6",
    "flow.tail_grid=sigma flow.tail_steps=7",
    "flow.tail_grid=sigma flow.tail_steps=8",
    "flow.tail_grid=sigma flow.tail_steps=9",
    "flow.tail_grid=sigma flow.tail_steps=5 flow.tail_solver=dpm2m",
    "ode.reuse=residual ode.reuse_share=0.45",
    "ode.reuse=residual ode.reuse_share=0.3",
    "ode.reuse=velocity ode.reuse_share=0.45",
    "ode.reuse=residual ode.reuse_share=0.45 ode.attention=int8",
    "ode.reuse=residual ode.reuse_share=0.3 ode.attention=int8",
    "flow.tail_grid=sigma flow.tail_steps=6 ode.attention=int8",
    "flow.tail_grid=sigma flow.tail_steps=8 ode.attention=int8",
    "flow.tail_grid=sigma flow.tail_steps=5 flow.tail_solver=dpm2m ode.attention=int8",
)
"""Two controls, and what the rungs of the ladder are made of."""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``fidelity run`` and ``fidelity choose``."""
    verb = subparsers.add_parser(
        "fidelity", description=summary, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = verb.add_subparsers(dest="fidelity_verb", required=True, metavar="run|choose")
    run = kinds.add_parser(
        "run", help="a table of settings against the exact tail", epilog=EXAMPLES,
        description="Finish the same rollouts exactly and under every setting; compare what a trainer makes of both.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_config(run)
    run.add_argument(
        "--setting", action="append", metavar="'KEY=VALUE ...'",
        help="overrides of one setting (repeatable; default: what --config has, and a set of reuse, coarse tails, int8 "
        "and controls)",
    )  # fmt: skip
    run.add_argument(
        "--groups", type=whole("--groups", 1), default=16, metavar="N", help="groups a window (default 16)"
    )
    run.add_argument(
        "--window", type=whole("--window", 0), action="append", metavar="START",
        help="window start (repeatable; default: that of the first iteration)",
    )  # fmt: skip
    run.add_argument(
        "--price", metavar="NAME|FILE", help="run of as many steps whose tail and hours are priced (default: --config)"
    )
    run.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="rows and records; continued if it is there"
    )
    run.set_defaults(run=run_table)
    choose = kinds.add_parser(
        "choose", help="measure the drift of an exact tail, by which ode.reuse chooses its steps",
        description="Write the drift along an exact tail: the file of ode.reuse_profile.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_config(choose)
    choose.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it is written")
    choose.set_defaults(run=run_choose)


def run_table(args: argparse.Namespace) -> int:
    """Measure what is missing, write rows and records, print the table."""
    from geoalign.files.atomic import atomic_write_json, check_writable, nan_to_none
    from geoalign.files.locks import writer_lock
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.fidelity import Bench, check_setting, table_rows
    from geoalign.jobs.pricing import exactly
    from geoalign.rl.window import WindowSchedule

    check_writable(args.json)
    base = read_config(args)
    first = WindowSchedule(base.window, base.flow.steps, base.run.seed)(0).start
    windows = list(dict.fromkeys(args.window or (first,)))
    if beyond := [w for w in windows if w + base.window.size > base.flow.steps - 1]:
        raise UsageError(f"--window {beyond[0]}: a window of {base.window.size} there reaches the last step")
    settings = [_setting(args, name, base) for name in dict.fromkeys(args.setting or [*_own(base), *DEFAULT_SETTINGS])]
    for setting in settings:
        check_setting(setting.name, setting.config, exactly(base))
    priced = {setting.name: _priced(args, setting.name, base) for setting in settings}
    made_with = exactly(base).model_dump(mode="json", exclude={"eval", "pretrain"})
    with writer_lock(args.json.absolute().parent, "table", f".lock-{args.json.name}"):
        records, notes = _earlier(args.json, made_with)
        for setting in settings:
            setting.remember(notes.get(setting.name, {}), f"--json {args.json}")
        known = {(record.setting, record.window, record.iteration) for record in records}
        bench = Bench(base, _source(base))
        try:
            for record in bench.rounds(settings, windows, args.groups, lambda *key: key in known):
                records.append(record)
                notes |= {setting.name: setting.notes for setting in settings if setting.notes}
                atomic_write_json(args.json, nan_to_none({"rows": []} | _kept(made_with, records, notes)))
                print(f"{record.setting}: window {record.window}, batch {record.iteration}", flush=True)
        finally:
            bench.close(settings)
        asked = [record for record in records if record.setting in priced and record.window in windows]
        rows = table_rows(asked, priced, base)
        result = {
            "rows": rows,
            "price": args.price or args.config,
            "base": str(base.train.base),
            **_kept(made_with, records, notes),
            **describe_environment(),
        }
        atomic_write_json(args.json, nan_to_none(result))
    print(table_text(rows))
    return 0


def _kept(made_with: dict[str, Any], records: Sequence[Record], notes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What :func:`_earlier` reads."""
    return {"made_with": made_with, "records": [each.as_json() for each in records], "notes": notes}


def run_choose(args: argparse.Namespace) -> int:
    """Measure the drift with one batch of groups and write it."""
    from geoalign.files.atomic import atomic_write_json, check_writable
    from geoalign.flow.reuse import DriftProfile, reused_steps
    from geoalign.flow.table import StepWindow, build_step_table
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.fidelity import Bench, Setting
    from geoalign.jobs.progress import bar
    from geoalign.training.drift import DRIFT

    check_writable(args.out)
    config = read_config(args)
    if config.ode.reuse == "off":
        raise UsageError("say what is reused: add ode.reuse=residual (or velocity) to the command")
    config = config.model_copy(update={"ode": config.ode.model_copy(update={"reuse_profile": None})})
    window = StepWindow(config.window.start, config.window.start + config.window.size)
    with bar(1, "measuring the drift", "batch") as shown:
        found = Bench(config, _source(config), rewards={}).drift(Setting("", config))
        shown.update(1)
    if (drift := found.get(DRIFT)) is None:
        raise RunError(
            "no drift could be measured: no sample is finite, or the earliest window leaves a tail of one step"
        )
    atomic_write_json(
        args.out, {**drift, "reuse": config.ode.reuse, "base": str(config.train.base), **describe_environment()}
    )
    table = build_step_table(config.flow, window)
    count = config.ode.evaluated(table.num_steps - window.stop)
    reused = reused_steps(table, DriftProfile(**drift), count)
    steps = [step for step in range(window.stop, table.num_steps) if step not in reused]
    print(f"{args.out}: drift over {len(drift['sigmas'])} levels; at ode.reuse_share={config.ode.reuse_share:g} the")
    print(f"earliest window evaluates {count} of {table.num_steps - window.stop} steps: {', '.join(map(str, steps))}")
    return 0


def _own(base: Config) -> list[str]:
    """The setting that the configuration itself is."""
    words = [f"{key}={value}" for key, value in base.approximations().items()]
    if base.ode.reuse != "off" and base.ode.reuse_profile is not None:
        words.append(f"ode.reuse_profile={base.ode.reuse_profile}")
    return [" ".join(words)] if words else []


def _setting(args: argparse.Namespace, name: str, base: Config) -> Setting:
    """A setting on top of the exact form of the configuration, which names no drift profile."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config
    from geoalign.jobs.fidelity import Setting
    from geoalign.jobs.ladder import undone

    return Setting(name, load_config(Config, args.config, [*args.overrides, *undone(base), *name.split()]))


def _priced(args: argparse.Namespace, name: str, base: Config) -> Config:
    """The run that is priced, with what the setting changes of its tail."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config
    from geoalign.jobs.ladder import undone

    words = [word for word in name.split() if word.startswith(("flow.", "ode."))]
    own = [] if args.price else args.overrides
    plain = load_config(Config, args.price or args.config, own)
    if (shape := (plain.flow.steps, plain.window.size)) != (base.flow.steps, base.window.size):
        raise UsageError(
            f"--price {args.price}: samples in {shape[0]} steps with a window of {shape[1]}, the table in "
            f"{base.flow.steps} with {base.window.size}: another tail; name a run of that sampler"
        )
    return load_config(Config, args.price or args.config, [*own, *undone(plain), *words])


def _earlier(path: Path, made_with: dict[str, Any]) -> tuple[list[Record], dict[str, dict[str, Any]]]:
    """The records of a file that this command began, and what its settings noted then."""
    from geoalign.files.parsing import read_json_object
    from geoalign.jobs.fidelity import Record, notes_of

    if not path.exists():
        return [], {}
    data, fix = read_json_object(path, DataError), "restore the file, or delete it and measure again"
    if data.get("made_with") != made_with:
        raise UsageError(f"--json {path}: made with another configuration; name another file, or delete it")
    records, notes = data.get("records"), data.get("notes", {})
    if not isinstance(records, list) or not isinstance(notes, dict):
        raise DataError(f"{path}: holds no records; {fix}")
    found = [Record.of(record, f"{path}: record {number}") for number, record in enumerate(records, 1)]
    places = [(record.setting, record.window, record.iteration) for record in found]
    if len(set(places)) < len(places):  # its groups would count twice
        raise DataError(f"{path}: a batch of a setting is there twice; {fix}")
    return found, {name: notes_of(noted, f"{path}: notes of {name}") for name, noted in notes.items()}


def _source(config: Config) -> RetakeDataset:
    from geoalign.data.source import RetakeDataset
    from geoalign.jobs.prepare import encoder_identity, render_missing_data

    render_missing_data(config, 0)
    encoder = encoder_identity(config) if config.data.use_cache else None
    return RetakeDataset(config.data, seed=config.run.seed, encoder=encoder)


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    names = ("cost", "spearman", "spearman_p10", "kendall", "flips", "flips_weighted", "psnr", "distance")
    biases = list(dict.fromkeys(name for row in rows for name in row if name.startswith("bias_")))
    width = max(len(row["setting"]) for row in rows)
    heads = ["window", *names, *biases, "hours"]
    lines = [f"{'setting':<{width}}  " + " ".join(f"{name[:12]:>12}" for name in heads)]
    for row in rows:
        cells = " ".join(f"{row[name]:>12.3f}" if name != "window" else f"{row[name]:>12}" for name in heads)
        lines.append(f"{row['setting']:<{width}}  {cells}  {'accepted' if row['accepted'] else ''}")
    return "\n".join(lines)
