"""``geoalign prepare``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from geoalign.cli.options import add_config, read_config

EXAMPLES = """\
examples:
  geoalign prepare --config tiny_cpu                       encode every clip once; run again to continue
  geoalign prepare --config paper_64xa800 --dry-run        predict disk and time from one window
  torchrun --nproc-per-node 8 -m geoalign prepare --config paper_64xa800
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``prepare``."""
    parser = subparsers.add_parser(
        "prepare",
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="encode one window, predict disk and time")
    parser.set_defaults(run=run_prepare)


def run_prepare(args: argparse.Namespace) -> int:
    """Encode this process's share of the windows."""
    from geoalign.jobs.progress import say

    config = read_config(args)
    say(f"prepare: windows of {config.data.clips_path} into {config.data.cache}")
    from geoalign.data.clips import list_clips
    from geoalign.data.prepare import prepare
    from geoalign.data.tally import Tally
    from geoalign.jobs.checks import require_inputs
    from geoalign.jobs.prepare import build_encoder, claim_device, render_missing_data
    from geoalign.jobs.progress import bar, bytes_text

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        require_inputs(config, "prepare")
    render_missing_data(config, rank)
    device_id = claim_device(config).index
    encoder = build_encoder(config)
    if args.dry_run:
        report = prepare(config.data, encoder, device_id=device_id, limit=1, dry_run=True)
        if not report.encoded:
            print(f"nothing to do: the first {report.reused} windows are prepared")
            return 0
        total = len(list_clips(config.data.clips_path, config.data.clips, Tally("clips")))
        total *= config.data.prepare.windows_per_clip
        print(f"predicted for at most {total:,} windows, from {report.encoded} measured on this machine:")
        share = total / report.encoded
        disk, hours = bytes_text(report.bytes * share), report.seconds * share / 3600
        print(f"  disk {disk}, one process {hours:.2f} h")
        return 0
    with bar(None, "preparing", "clip", shown=rank == 0) as shown:
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            shown.total = total
            shown.update(done - before)
            before = done

        report = prepare(config.data, encoder, rank=rank, world_size=world_size, device_id=device_id, progress=progress)
    print(
        f"encoded {report.encoded} windows ({bytes_text(report.bytes)}) in {report.seconds:.1f} s, kept {report.reused}"
    )
    if report.tally is not None and (report.tally.rejected or report.tally.remarks):
        print(report.tally.summary())
    return 0
