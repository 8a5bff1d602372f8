"""``geoalign train``."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, read_config
from geoalign.errors import UsageError
from geoalign.jobs.progress import say
from geoalign.training.processes.launcher import run_ranks, started_by_launcher

if TYPE_CHECKING:
    from geoalign.config.schema import Config

EXAMPLES = """\
examples:
  geoalign train --config tiny_cpu                          the demo, a few minutes on a laptop
  geoalign train --config tiny_cpu run.seed=2 run.name=s2   another seed in another folder
  geoalign train --config tiny_cpu --resume auto            continue after a crash or Ctrl-C
  geoalign train --config paper_64xa800 --dry-run           what would run: shapes, counts, trained parameters
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``train``."""
    parser = subparsers.add_parser(
        "train",
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument(
        "--resume", metavar="auto|latest|PATH", help="continue from a checkpoint (auto: if there is one)"
    )
    parser.add_argument("--allow-config-change", action="store_true", help="resume although settings changed")
    parser.add_argument("--profile", type=int, metavar="N", help="write a trace of iteration N into the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train; prints the held-out improvement and where the report lies."""
    config = read_config(args)
    from geoalign.training.processes.cores import ranks_of, under_launcher

    if args.dry_run:
        return _dry_run(config)
    if args.profile is not None and not 0 <= args.profile < config.train.iterations:
        raise UsageError(f"--profile {args.profile}: iterations are 0 to {config.train.iterations - 1}")
    ranks = ranks_of(config)
    if not started_by_launcher():
        _announce(config, ranks)
    if ranks > 1 and not under_launcher():
        return run_ranks(ranks, _arguments(args))
    from geoalign.jobs.train import run_training

    folder = run_training(
        config, resume=args.resume, allow_config_change=args.allow_config_change, profile=args.profile
    )
    summary = folder / "summary.json"
    if not summary.exists() or os.environ.get("RANK", "0") != "0":
        return 0
    from geoalign.files.parsing import read_json_object
    from geoalign.report.page import write_report

    report = write_report(folder)
    print_comparison(read_json_object(summary))
    print(f"report: {report}")
    return 0


def _announce(config: Config, ranks: int) -> None:
    """The first line, before PyTorch is imported, which takes seconds."""
    train, groups = config.train, config.groups
    on = f"{ranks} processes" if ranks > 1 else "one process"
    say(f"{config.run.name}: {train.iterations} iterations of {groups.conditions} x {groups.size} rollouts on {on}")


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line of a rank: what ``args`` was parsed from."""
    words = ["train", "--config", args.config]
    words += [] if args.resume is None else ["--resume", args.resume]
    words += ["--allow-config-change"] if args.allow_config_change else []
    words += [] if args.profile is None else ["--profile", str(args.profile)]
    return [*words, *args.overrides]


def print_comparison(summary: dict[str, Any]) -> None:
    """The table of held-out numbers; nothing for real clips, which have none."""
    if not summary["held_out"]:
        return
    from geoalign.geometry.metrics import AXES

    names = {
        "translation_error_m": "position error (m)",
        "last_translation_error_m": "position error, last frame (m)",
        "rotation_error_deg": "rotation error (deg)",
        **{f"gain_{axis}": f"travelled over asked, {axis}" for axis in AXES},
        "psnr_db": "PSNR against the truth (dB)",
    }
    print(f"\nheld-out, mean over noise seeds{'':<14}before    after   change")
    for kind in summary["held_out"]:
        before, after = (
            {key: math.nan if value is None else value for key, value in summary["held_out"][kind][stage].items()}
            for stage in ("before", "after")
        )
        for key in (name for name in names if name in before and name in after):
            change = (
                f"{after[key] - before[key]:+.2f}"
                if key == "psnr_db" or key.startswith("gain_") or before[key] == 0
                else f"{after[key] / before[key] - 1:+.0%}"
            )
            print(f"  {kind:<8} {names[key]:<32} {before[key]:>8.3f} {after[key]:>8.3f} {change:>8}")


def _dry_run(config: Config) -> int:
    from geoalign.jobs.train_dry_run import describe_run

    for name, value in describe_run(config).items():
        print(f"{name:<12} {value}")
    return 0
