"""Options that several verbs share, each spelled once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.errors import UsageError

if TYPE_CHECKING:
    from geoalign.config.schema import Config

LEAST_SIDE = 16
"""Pixels: no video model and no pose evaluator sees anything in a smaller frame."""
STDOUT = "-"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the settings that replace those of the file."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="preset or .yaml file (`geoalign config print --config NAME`)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the options of :func:`add_config` name; raises ConfigError."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config

    return load_config(Config, args.config, args.overrides)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json``: where ``what`` is written."""
    parser.add_argument("--json", metavar="FILE", help=f"also write {what} to FILE; - prints JSON instead of the text")


def check_json(args: argparse.Namespace) -> None:
    """Refuse a ``--json`` that cannot be written, before the work; raises UsageError or DataError."""
    from geoalign.io_utils import check_writable

    if args.json not in (None, STDOUT):
        check_writable(Path(args.json))


def write_json(args: argparse.Namespace, data: Any) -> bool:
    """Write ``data`` to where ``--json`` says, NaN as null; whether the text is still to be printed."""
    from geoalign.io_utils import atomic_write_json, nan_to_none

    if args.json == STDOUT:
        print(json.dumps(nan_to_none(data), indent=2))
        return False
    if args.json is not None:
        atomic_write_json(Path(args.json), nan_to_none(data))
    return True


def frame_size(text: str) -> tuple[int, int]:
    """(height, width) of ``HxW``; raises UsageError."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"--size {text}: expected HEIGHTxWIDTH, for instance 480x832") from error
    if min(height, width) < LEAST_SIDE:
        raise UsageError(f"--size {text}: each side must have at least {LEAST_SIDE} pixels")
    return height, width


def four_numbers(text: str) -> tuple[float, float, float, float]:
    """Four numbers separated by commas, as a ``type`` of ``argparse``."""
    try:
        first, second, third, fourth = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"four numbers separated by commas, got {text!r}") from error
    return first, second, third, fourth


def print_held_out(numbers: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print each metric's mean over noise seeds, by kind of path."""
    for kind, rows in numbers.items():
        print(kind)
        for name, values in rows.items():
            spread = f" (noise seeds {', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
            print(f"  {name:<28} {sum(values) / len(values):8.3f}{spread}")


def bytes_text(count: float) -> str:
    """``count`` bytes with a unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
