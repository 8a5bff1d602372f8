"""``geoalign benchmark run|table|report``: the paper's evaluation, from clips to tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, examples, read_config

if TYPE_CHECKING:
    from geoalign.benchmark.run import Tick
    from geoalign.benchmark.store import Store


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``benchmark`` and its verbs."""
    shown = examples(
        "geoalign benchmark run --config tiny_cpu --model base=builtin:tiny_base --model trained=runs/tiny_cpu",
        "geoalign benchmark table benchmarks/tiny_cpu",
        "geoalign benchmark report benchmarks/tiny_cpu",
    )
    parser = subparsers.add_parser("benchmark", description=summary, **shown)
    verbs = parser.add_subparsers(dest="action", required=True, metavar="run|table|report")
    _add_run(verbs)
    _add_table(verbs)
    _add_report(verbs)


def _add_run(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run",
        help="make and measure the cases that are not done, then print the tables",
        epilog="examples:\n"
        "  geoalign benchmark run --config tiny_cpu --model base=builtin:tiny_base --model trained=runs/tiny_cpu\n"
        "  torchrun --nproc-per-node 8 -m geoalign benchmark run --config davis --model base=weights/BASE \\\n"
        "      --checkpoint base=weights/redirector/step20000.safetensors --model trained=runs/node_8gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=MODEL",
        help="a method of ours, as `geoalign sample --model` names one (repeatable)")  # fmt: skip
    add("--checkpoint", action="append", default=[], metavar="NAME=FILE",
        help="what was trained on top of the model of that name")  # fmt: skip
    add("--videos", action="append", default=[], metavar="NAME=FOLDER",
        help="a method of others: videos called CLIP_camera_K_speed_S.mp4 (repeatable)")  # fmt: skip
    _add_numbers(parser)
    add("--out", type=Path, metavar="DIR", help="folder of the benchmark (default benchmarks/ and run.name)")
    add("--dry-run", action="store_true", help="print cases, passes, predicted hours and disk, and stop")
    add("--retry-failed", action="store_true", help="do again what failed in an earlier run")
    parser.set_defaults(run=run)


def _add_table(verbs: Any) -> None:
    parser = verbs.add_parser(
        "table",
        help="write and print the tables of a benchmark: markdown, LaTeX, CSV",
        **examples("geoalign benchmark table benchmarks/davis benchmark.base=base"),
    )
    _add_folder(parser)
    _add_numbers(parser)
    parser.set_defaults(run=table)


def _add_report(verbs: Any) -> None:
    parser = verbs.add_parser(
        "report",
        help="write the benchmark as one HTML file that opens offline",
        **examples("geoalign benchmark report benchmarks/davis"),
    )
    _add_folder(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the folder")
    parser.set_defaults(run=report)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a benchmark that is there, and settings of its tables."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the benchmark")
    parser.add_argument("overrides", nargs="*", metavar="benchmark.key=value", help="settings of the tables")


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """Add ``--numbers``."""
    told = "JSON of numbers as printed by their authors, shown beside"
    parser.add_argument("--numbers", type=Path, metavar="FILE", help=told)


def run(args: argparse.Namespace) -> int:
    """Work on the cases of this process; the one that finds all of them done writes the tables."""
    config = read_config(args)
    import torch

    from geoalign.benchmark.forecast import forecast
    from geoalign.benchmark.methods import MethodArguments
    from geoalign.benchmark.run import Plan, Shard, left_over
    from geoalign.benchmark.run import run as run_cases
    from geoalign.benchmark.store import Store
    from geoalign.jobs.checks import require_inputs

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    at, store = Shard.of_environment(), Store(args.out or Path("benchmarks") / config.run.name)
    arguments = MethodArguments(tuple(args.model), tuple(args.checkpoint), tuple(args.videos))
    _read_numbers(args.numbers)
    if not args.dry_run:
        require_inputs(config, "benchmark")
    plan = Plan.build(config, arguments, readers=not args.dry_run)
    if args.dry_run:
        print(forecast(plan, store, retry_failed=args.retry_failed).text(at.size))
        return 0
    with _progress() as tick:
        run_cases(plan, store, at, retry_failed=args.retry_failed, tick=tick)
    if left := left_over(store, plan):
        print(f"{store.folder}: the share of this process is done; {left} cases are with other processes")
        return 0
    return _write_tables(store, args.numbers, ())


def table(args: argparse.Namespace) -> int:
    """Write and print the tables."""
    from geoalign.benchmark.store import Store

    return _write_tables(Store(args.folder), args.numbers, tuple(args.overrides))


def report(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    from geoalign.benchmark.report import write_report
    from geoalign.benchmark.store import Store

    print(write_report(Store(args.folder), args.out, tuple(args.overrides)))
    return 0


def _read_numbers(path: Path | None) -> None:
    """Refuse numbers of others that cannot be read, before the work."""
    from geoalign.benchmark.table import read_numbers

    if path is not None:
        read_numbers(path)


def _write_tables(store: Store, numbers: Path | None, overrides: tuple[str, ...]) -> int:
    from geoalign.benchmark.render import markdown, write_tables
    from geoalign.benchmark.table import Results, all_tables

    if numbers is not None:
        _read_numbers(numbers)
        store.keep_numbers(numbers)
    tables = all_tables(Results.read(store, overrides))
    store.write_rows_jsonl()
    write_tables(tables, store.folder / "tables")
    print("\n".join(map(markdown, tables)))
    print(f"{store.folder / 'tables'}: {len(tables)} tables as .md, .tex and .csv")
    print(f"{store.folder / 'cases.jsonl'}: every case")
    return 0


@contextmanager
def _progress() -> Iterator[Tick]:
    """A bar on a terminal, lines with the time that is left in a log; of the first process."""
    from geoalign.jobs.progress import bar

    with bar(None, "benchmark", "case") as shown:
        done = 0

        def tick(case: Any, left: int) -> None:
            nonlocal done
            done += 1
            shown.total = done + left
            shown.update()

        yield tick
