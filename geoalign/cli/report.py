"""``geoalign report RUN``: the self-contained HTML report of a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``report``."""
    parser = subparsers.add_parser(
        "report",
        description=f"{summary}, or of several side by side: changed settings, paired differences, the same films. It "
        "opens offline.",
        epilog="examples:\n  geoalign report runs/exp1\n  geoalign report runs/exp1 --follow\n"
        "  geoalign report runs/exp1 runs/exp2 --out two.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="the run's folder, e.g. runs/exp1; up to 8")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html (of several: compare.html) in the first folder"
    )
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="held-out samples with clips (default 4)")
    parser.add_argument(
        "--follow", action="store_true", help="keep the page of trainings under way up to date until they end"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    from geoalign.report.compare import write_comparison
    from geoalign.report.page import follow, write_report

    told = []

    def write() -> None:
        if len(args.run_folders) > 1:
            path = write_comparison(args.run_folders, args.out, samples=args.samples)
        else:
            path = write_report(args.run_folders[0], args.out, samples=args.samples)
        if not told:  # at once: a run that is followed may take days
            print(path, flush=True)
            told.append(path)

    if args.follow:
        follow(args.run_folders, write)
    else:
        write()
    return 0
