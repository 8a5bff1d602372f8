"""``geoalign world render``: write the embedded world to disk, or one picture of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, read_config

EXAMPLES = """\
examples:
  geoalign world render --config tiny_cpu                       clips, camera files and path archives under data.root
  geoalign world render --config tiny_cpu --sheet world.png     a contact sheet: source frames beside true target frames
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``world`` with its sub-verb."""
    parser = subparsers.add_parser(
        "world",
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="world_verb", required=True, metavar="render")
    render = verbs.add_parser(
        "render",
        help="write clips and camera archives",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(render)
    render.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of paired renders instead")
    render.set_defaults(run=run_render)


def run_render(args: argparse.Namespace) -> int:
    """Render the world to ``data.root`` or a contact sheet to ``--sheet``."""
    from geoalign.errors import ConfigError
    from geoalign.files.atomic import check_writable
    from geoalign.jobs.progress import bar
    from geoalign.world.dataset import is_complete, write_world
    from geoalign.world.sheet import write_sheet

    config = read_config(args)
    if config.world is None:
        raise ConfigError(f"{args.config} has no world section; use tiny_cpu")
    if args.sheet:
        check_writable(args.sheet, (".png",))
        write_sheet(config.world, args.sheet)
        print(f"contact sheet: {args.sheet}")
    else:
        found = is_complete(config.data, config.world)
        with bar(0 if found else config.world.clips, "rendering", "clip") as shown:
            write_world(config.data, config.world, shown.update)  # of a complete one, what a kill left goes
        written = f"{config.world.clips} clips, {config.world.trajectories} target paths"
        print(f"{config.data.root}: {'complete already' if found else written}")
    return 0
