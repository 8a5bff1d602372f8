"""Options that several verbs share, each spelled once."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from geoalign.jobs import arguments

if TYPE_CHECKING:
    from geoalign.config.schema import Config

STDOUT = "-"


def examples(*lines: str) -> dict[str, Any]:
    """Keywords of a parser that show command lines below its options, as they are written."""
    text = "\n".join(["examples:", *(f"  {line}" for line in lines)])
    return {"epilog": text, "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--config`` and the settings that replace those of the file."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="NAME|FILE",
        help="preset or .yaml file (`geoalign config print --config NAME`)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


CAMERA_HELP = (
    "a preset (pan_right, tilt_up, zoom_in, translate_up, arc_left, ...) or a camera file: npz with extrinsic and "
    "intrinsic (also of VGGT), npy, npz or JSON with c2w, the JSON of `geoalign sample`, ReCamMaster JSON, ViPE npz, "
    "transforms.json of nerfstudio, trajectory.json of Redirect4D-Bench, text of RealEstate10K, TUM or KITTI; "
    "FILE#CAMERA chooses where a file holds "
    "several, as in camera_extrinsics.json#cam05; FILE#axes=opengl:direction=w2c:unit=cm:size=1080x1920 says what the "
    "file does not (docs/data.md)"
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


def add_reward(parser: argparse.ArgumentParser) -> None:
    """Add ``--reward``, ``--evaluator`` and ``--set``, which :func:`read_reward` reads."""
    own = "or package.module:Class of your own code, which is run"
    parser.add_argument("--reward", help=f"registered reward (default geometry), {own}")
    parser.add_argument("--evaluator", help=f"pose evaluator of a reward that is built on one (default planar), {own}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE",
        help="option of the reward, named as under rewards.NAME.options in a configuration (repeatable)",
    )  # fmt: skip


def read_reward(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Kind and options of the reward that the options of :func:`add_reward` name; raises ConfigError."""
    from geoalign.config.source import parse_settings
    from geoalign.rewards.registry import takes_evaluator

    kind = args.reward or "geometry"
    evaluator = {"evaluator": args.evaluator or "planar"} if takes_evaluator(kind) else {}
    return kind, evaluator | parse_settings(args.set)


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the options of :func:`add_config` name; raises ConfigError."""
    from geoalign.config.load import load_config
    from geoalign.config.schema import Config

    return load_config(Config, args.config, args.overrides).asked_for(args.config, args.overrides)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json``: where ``what`` is written."""
    parser.add_argument("--json", metavar="FILE", help=f"also write {what} to FILE; - prints JSON instead of the text")


def check_json(args: argparse.Namespace) -> None:
    """Refuse a ``--json`` that cannot be written, before the work; raises UsageError or DataError."""
    from geoalign.files.atomic import check_writable

    if args.json not in (None, STDOUT):
        check_writable(Path(args.json))


def write_json(args: argparse.Namespace, data: Any) -> bool:
    """Write ``data`` to where ``--json`` says, NaN as null; whether the text is still to be printed."""
    from geoalign.files.atomic import atomic_write_json, nan_to_none

    if args.json == STDOUT:
        print(json.dumps(nan_to_none(data), indent=2))
        return False
    if args.json is not None:
        atomic_write_json(Path(args.json), nan_to_none(data))
    return True


def frame_count(text: str) -> int | Literal["all"]:
    """A number of frames or "all", as a ``type`` of ``argparse``."""
    if text == "all":
        return "all"
    return whole("--frames", 1)(text)


def frame_size(text: str) -> tuple[int, int]:
    """(height, width) of ``HxW``; raises UsageError."""
    sides = text.lower().split("x")
    return arguments.frame_size(
        "size", tuple(map(int, sides)) if len(sides) == 2 and all(map(_is_whole, sides)) else text
    )


def whole(option: str, least: int) -> Callable[[str], int]:
    """A ``type`` of ``argparse``: a whole number of at least ``least``; raises UsageError, which names ``option``."""
    return lambda text: arguments.whole(_name_of(option), int(text) if _is_whole(text) else text, least)


def positive(option: str) -> Callable[[str], float]:
    """A ``type`` of ``argparse``: a finite number above 0; raises UsageError, which names ``option``."""
    return lambda text: arguments.positive(_name_of(option), _number(text))


def four_numbers(option: str) -> Callable[[str], tuple[float, float, float, float]]:
    """A ``type`` of ``argparse``: four finite numbers, comma-separated; raises UsageError, which names ``option``."""
    return lambda text: arguments.four_numbers(_name_of(option), tuple(map(_number, text.split(","))))


def _name_of(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d{1,18}", text) is not None


def _number(text: str) -> float | str:
    """The number that a text writes, or the text itself, which no rule takes."""
    try:
        return float(text)
    except ValueError:
        return text


def print_held_out(numbers: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print each metric's mean over noise seeds, by kind of path."""
    from geoalign.jobs.evaluation_table import mean_of_defined

    for kind, rows in numbers.items():
        print(kind)
        for name, values in rows.items():
            spread = f" (noise seeds {', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
            print(f"  {name:<28} {mean_of_defined(values):8.3f}{spread}")
