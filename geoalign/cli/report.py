"""``geoalign report RUN``: the self-contained HTML report of a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geoalign.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write the HTML report of a run folder",
        description="Write one HTML file with results, clips, camera paths and curves of a run. It opens offline.",
        epilog="example:\n  geoalign report runs/exp1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run's folder, e.g. runs/exp1")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the run folder")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="held-out samples with clips (default 4)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    print(write_report(args.run_folder, args.output, samples=args.samples))
    return 0


def write_report(folder: str | Path, output: Path | None = None, *, samples: int = 4) -> Path:
    """Write the report of ``folder`` to ``output`` (default ``folder/report.html``) and return its path.

    Raises:
        UsageError: ``folder`` is not a run folder, or fewer than 0 samples are asked for.
        DataError: a file of the run cannot be read, or the report cannot be written.
    """
    from geoalign.io_utils import atomic_write_text, check_writable
    from geoalign.report.page import report_page
    from geoalign.report.run_folder import read_run

    if samples < 0:
        raise UsageError(f"--samples {samples}: 0 or more held-out samples can be shown")
    path, found = output or Path(folder) / "report.html", read_run(folder)
    check_writable(path)
    atomic_write_text(path, report_page(found, samples))
    return path
