"""``geoalign report RUN``: the self-contained HTML report of a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write the HTML report of a run folder",
        description="Write one HTML file with results, clips, camera paths and curves of a run. It opens offline.",
        epilog="examples:\n  geoalign report runs/exp1\n  geoalign report runs/exp1 --follow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run's folder, e.g. runs/exp1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run folder")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="held-out samples with clips (default 4)")
    parser.add_argument(
        "--follow", action="store_true", help="keep the report of a running training up to date until it ends"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    from geoalign.report.page import follow_report, write_report

    write = follow_report if args.follow else write_report
    print(write(args.run_folder, args.out, samples=args.samples))
    return 0
