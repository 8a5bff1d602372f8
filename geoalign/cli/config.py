"""``geoalign config print | check | diff | schema | docs``: look at settings before spending GPU hours on them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.config.layout import deal_groups
from geoalign.config.load import flatten, load_config, to_yaml
from geoalign.config.source import load_raw, preset_names
from geoalign.errors import UsageError

if TYPE_CHECKING:
    from geoalign.config.schema import Config

EXAMPLES = """\
examples:
  geoalign config print tiny_cpu
  geoalign config print node_8gpu optim.lr=5e-6
  geoalign config check paper_64xa800 --world-size 64
  geoalign config diff single_gpu node_8gpu
  geoalign config schema > geoalign.schema.json      (for the YAML plugin of an editor)
"""


def add_parser(subparsers: Any) -> None:
    """Add ``config`` and its sub-verbs."""
    parser = subparsers.add_parser(
        "config",
        help="print, check and compare configurations",
        description="Look at the settings of a run before running it. CONFIG is a preset or a .yaml path.",
        epilog=EXAMPLES + f"\npresets: {', '.join(preset_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="config_verb", required=True, metavar="print|check|diff|schema|docs")

    show = verbs.add_parser("print", help="the resolved configuration as YAML")
    _add_config_arguments(show)
    show.add_argument("--sources", action="store_true", help="say beside each written value where it comes from")
    show.set_defaults(run=run_print)

    check = verbs.add_parser("check", help="validate, also against a number of processes")
    _add_config_arguments(check)
    check.add_argument("--world-size", type=int, metavar="N", help="number of processes the run will have")
    check.set_defaults(run=run_check)

    diff = verbs.add_parser("diff", help="keys whose resolved values differ between two configurations")
    diff.add_argument("left", help="preset name, .yaml path, or `defaults` for the schema's own values")
    diff.add_argument("right", help="preset name or .yaml path")
    diff.set_defaults(run=run_diff)

    schema = verbs.add_parser("schema", help="JSON schema of all settings")
    schema.set_defaults(run=run_schema)

    docs = verbs.add_parser("docs", help="the reference page of all settings (docs/configuration.md)")
    docs.add_argument("--write", type=Path, metavar="FILE", help="write it there instead of printing it")
    docs.set_defaults(run=run_docs)


def run_print(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or with ``--sources`` only what was written and where."""
    config = load_config(_schema(), args.config, args.overrides)
    if not args.sources:
        print(to_yaml(config), end="")
        return 0
    raw = load_raw(args.config, args.overrides)
    rows = [
        (f"{key} = {_yaml_value(value)}", raw.origin(tuple(key.split(".")))) for key, value in flatten(raw.data).items()
    ]
    width = max((len(text) for text, _ in rows), default=0)
    for text, origin in rows:
        print(f"{text:<{width}}  # {origin}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Validate; with ``--world-size`` also the parallel layout."""
    config = load_config(_schema(), args.config, args.overrides)
    if args.world_size is not None:
        if args.world_size < 1:
            raise UsageError(f"--world-size must be at least 1, got {args.world_size}.")
        deal_groups(config.groups.conditions, config.groups.size, args.world_size, config.parallel.sequence)
    suffix = f" on {args.world_size} process(es)" if args.world_size is not None else ""
    print(f"{args.config}: valid{suffix}")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Print one line per differing key: left value, right value."""
    left, right = (flatten(_resolved(name)) for name in (args.left, args.right))
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key, _ABSENT) != right.get(key, _ABSENT)]
    if not keys:
        print(f"{args.left} and {args.right} resolve to the same settings")
        return 0
    width = max(len(key) for key in keys)
    for key in keys:
        print(f"{key:<{width}}  {_side(left, key)} -> {_side(right, key)}")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    """Print the JSON schema."""
    json.dump(_schema().model_json_schema(), sys.stdout, indent=2)
    print()
    return 0


def run_docs(args: argparse.Namespace) -> int:
    """Print or write the reference page."""
    from geoalign.config.docs import reference_page
    from geoalign.io_utils import atomic_write_text, check_writable

    if args.write:
        check_writable(args.write)
    page = reference_page(_schema())
    if args.write:
        atomic_write_text(args.write, page)
    else:
        print(page, end="")
    return 0


_ABSENT = object()


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="preset name or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def _schema() -> type[Config]:
    from geoalign.config.schema import Config

    return Config


def _resolved(name: str) -> dict[str, Any]:
    schema = _schema()
    config = schema() if name == "defaults" else load_config(schema, name)
    return config.model_dump(mode="json")


def _side(flat: dict[str, Any], key: str) -> str:
    return _yaml_value(flat[key]) if key in flat else "(absent)"


def _yaml_value(value: Any) -> str:
    return json.dumps(value)
