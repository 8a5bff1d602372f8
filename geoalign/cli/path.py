"""``geoalign path draw``: a page on which a camera path is drawn by hand over a video."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, read_config, whole

EXAMPLES = """\
examples:
  geoalign path draw --video clip.mp4 --out path.html
  geoalign path draw --video clip.mp4 --out path.html --config tiny_cpu --frames 9    speeds of that training
  geoalign sample --model runs/tiny_cpu --video clip.mp4 --trajectory clip_path.npz --out retake.mp4
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``path`` with its sub-verb."""
    parser = subparsers.add_parser(
        "path",
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="path_verb", required=True, metavar="draw")
    draw = verbs.add_parser(
        "draw",
        help="write an offline page: the film, the path from above and from the side, its speeds",
        description="Write one HTML file that opens offline. The path is edited from above and from the side, with its "
        "speeds against the law of training, and saved as an npz that every verb takes as a camera.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    draw.add_argument("--video", type=Path, required=True, metavar="V", help="a video file or a folder of frames")
    draw.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page")
    draw.add_argument(
        "--frames", type=whole("--frames", 2), metavar="N", help="length of the path (default: the video's, at most 81)"
    )
    add_config(draw, required=False)
    draw.set_defaults(run=run_draw)


def run_draw(args: argparse.Namespace) -> int:
    """Write the page."""
    from geoalign.config.data import RescaleConfig
    from geoalign.files.atomic import check_writable
    from geoalign.jobs.draw_path import write_path_page

    check_writable(args.out, (".html", ".htm"))
    law = RescaleConfig() if args.config is None else read_config(args).data.trajectories.rescale
    print(write_path_page(args.video, args.out, law, args.frames))
    return 0
