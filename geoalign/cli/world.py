"""``geoalign world render``: write the embedded world to disk, or one picture of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_ENLARGED, _HEADER, _GAP = 3, 24, 4  # times, pixels, pixels before enlarging

EXAMPLES = """\
examples:
  geoalign world render --config tiny_cpu                       clips, camera files and path archives under data.root
  geoalign world render --config tiny_cpu --sheet world.png     a contact sheet: source frames beside true target frames
"""


def add_parser(subparsers: Any) -> None:
    """Add ``world`` with its sub-verb."""
    parser = subparsers.add_parser("world", help="the embedded world", description="The embedded drone world.")
    verbs = parser.add_subparsers(dest="world_verb", required=True, metavar="render")
    render = verbs.add_parser(
        "render",
        help="write clips and camera archives",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    render.add_argument("--config", required=True, help="preset or .yaml with a world section")
    render.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of paired renders instead")
    render.add_argument("overrides", nargs="*", metavar="section.key=value")
    render.set_defaults(run=run_render)


def run_render(args: argparse.Namespace) -> int:
    """Render the world to ``data.root`` or a contact sheet to ``--sheet``."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config
    from geoalign.errors import ConfigError
    from geoalign.world.dataset import is_complete, write_world

    config = load_config(Config, args.config, args.overrides)
    if config.world is None:
        raise ConfigError(f"{args.config} has no world section; use tiny_cpu")
    if args.sheet:
        write_sheet(config.world, args.sheet)
        print(f"contact sheet: {args.sheet}")
    elif is_complete(config.data, config.world):
        print(f"{config.data.root}: complete already")
    else:
        write_world(config.data, config.world)
        print(f"{config.data.root}: {config.world.clips} clips, {config.world.trajectories} target paths")
    return 0


def write_sheet(world: Any, path: Path, rows: int = 10) -> None:
    """One row per preset path: the source frames, then the true target frames, enlarged three times and labelled."""
    import torch
    from PIL import Image, ImageDraw

    from geoalign.io_utils import atomic_path
    from geoalign.world.pairs import paired_videos

    pairs = paired_videos(world, rows, torch.Generator().manual_seed(world.seed), paths="presets", style="real")
    gap = torch.ones(rows, 3, world.height, _GAP)
    frames = [*pairs.batch.source.video.unbind(1), gap, *pairs.truth.unbind(1)]
    sheet = torch.cat(list(torch.cat(frames, dim=-1)), dim=-2)
    pixels = ((sheet.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture = picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED), Image.Resampling.BICUBIC)
    labelled = Image.new("RGB", (picture.width, picture.height + _HEADER), "white")
    labelled.paste(picture, (0, _HEADER))
    draw = ImageDraw.Draw(labelled)
    for left, label in ((0, "source frames"), ((picture.width + _GAP * _ENLARGED) // 2, "true target frames")):
        draw.text((left + 4, 2), label, "black", font_size=_HEADER - 8)
    with atomic_path(path) as temporary:
        labelled.save(temporary)
