"""Options that several verbs share, each spelled once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geoalign.config.schema import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the settings that replace those of the file."""
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help="preset or .yaml file (`geoalign config print NAME`)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


CAMERA_HELP = (
    "a preset (pan_right, tilt_up, zoom_in, translate_up, arc_left, ...) or a camera file: npz with extrinsic and "
    "intrinsic, npy, npz or JSON with c2w, the JSON of `geoalign sample`, ReCamMaster JSON, ViPE npz; FILE#CAMERA "
    "chooses where a file holds several, as in camera_extrinsics.json#cam05"
)
"""What stands for a camera wherever an option takes one (see docs/data.md)."""


def add_cameras(parser: argparse.ArgumentParser, *, target: str, source: str, required: bool = False) -> None:
    """Add ``--trajectory`` and ``--source-camera``; ``target`` and ``source`` say what this verb does with them."""
    parser.add_argument(
        "--trajectory", metavar="CAMERA", required=required, help=f"target path: {CAMERA_HELP}. {target}"
    )
    parser.add_argument("--source-camera", metavar="CAMERA", help=f"camera of the source, named likewise; {source}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--checkpoint``, which :func:`geoalign.policy.open.describe` opens."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="MODEL",
        help="policy file, run folder, checkpoint folder, exported folder, published weights, or builtin:tiny_base",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="trained on top of it: a delta, or on published weights a full state dict",
    )


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the options of :func:`add_config` name; raises ConfigError."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config

    return load_config(Config, args.config, args.overrides)


def print_held_out(numbers: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print each metric's mean over noise seeds, by kind of path."""
    from geoalign.jobs.evaluate import mean_of_defined

    for kind, rows in numbers.items():
        print(kind)
        for name, values in rows.items():
            spread = f" (noise seeds {', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
            print(f"  {name:<28} {mean_of_defined(values):8.3f}{spread}")


def bytes_text(count: float) -> str:
    """``count`` bytes with a unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
