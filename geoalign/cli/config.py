"""``geoalign config print | check | diff | schema | docs``: look at settings before spending GPU hours on them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, examples, read_config, whole
from geoalign.config.layout import deal_groups
from geoalign.config.load import differing_keys, flatten, load_config, to_yaml
from geoalign.config.source import load_raw, preset_names
from geoalign.errors import UsageError

if TYPE_CHECKING:
    from geoalign.config.schema import Config

DEFAULTS = "defaults"
EXAMPLES = """\
examples:
  geoalign config print --config tiny_cpu
  geoalign config print --config node_8gpu optim.lr=5e-6
  geoalign config check --config paper_64xa800 --world-size 64
  geoalign config diff --config node_8gpu --against single_gpu
  geoalign config schema > geoalign.schema.json      (for the YAML plugin of an editor)
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``config`` and its sub-verbs."""
    parser = subparsers.add_parser(
        "config",
        description=summary,
        epilog=EXAMPLES + f"\npresets: {', '.join(preset_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="config_verb", required=True, metavar="print|check|diff|schema|docs")

    show = verbs.add_parser(
        "print",
        help="the resolved configuration as YAML",
        **examples(
            "geoalign config print --config tiny_cpu",
            "geoalign config print --config node_8gpu optim.lr=5e-6 --sources",
        ),
    )
    add_config(show)
    show.add_argument("--sources", action="store_true", help="say beside each written value where it comes from")
    show.set_defaults(run=run_print)

    check = verbs.add_parser(
        "check",
        help="validate, also against a number of processes",
        **examples("geoalign config check --config paper_64xa800 --world-size 64"),
    )
    add_config(check)
    check.add_argument(
        "--world-size", type=whole("--world-size", 1), metavar="N", help="number of processes the run will have"
    )
    check.set_defaults(run=run_check)

    diff = verbs.add_parser(
        "diff",
        help="keys whose resolved values differ between two configurations",
        **examples("geoalign config diff --config node_8gpu --against single_gpu"),
    )
    add_config(diff)
    diff.add_argument(
        "--against", default=DEFAULTS, metavar="NAME|FILE", help="the other one (default: the schema's own values)"
    )
    diff.set_defaults(run=run_diff)

    schema = verbs.add_parser(
        "schema", help="JSON schema of all settings", **examples("geoalign config schema > geoalign.schema.json")
    )
    schema.set_defaults(run=run_schema)

    docs = verbs.add_parser(
        "docs",
        help="the reference page of all settings (docs/configuration.md)",
        **examples("geoalign config docs --out docs/configuration.md"),
    )
    docs.add_argument("--out", type=Path, metavar="FILE", help="write it there instead of printing it")
    docs.set_defaults(run=run_docs)


def run_print(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or with ``--sources`` only what was written and where."""
    config = read_config(args)
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
    config = read_config(args)
    if args.world_size is not None:
        if args.world_size < 1:
            raise UsageError(f"--world-size must be at least 1, got {args.world_size}.")
        deal_groups(config.groups.conditions, config.groups.size, args.world_size, config.parallel.sequence)
    suffix = f" on {args.world_size} process(es)" if args.world_size is not None else ""
    print(f"{args.config}: valid{suffix}")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Print one line per differing key: value of ``--against``, value of ``--config``."""
    schema = _schema()
    other = schema() if args.against == DEFAULTS else load_config(schema, args.against)
    left, right = (flatten(config.model_dump(mode="json")) for config in (other, read_config(args)))
    keys = differing_keys(left, right)
    if not keys:
        print(f"{args.against} and {args.config} resolve to the same settings")
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
    from geoalign.files.atomic import atomic_write_text, check_writable

    if args.out:
        check_writable(args.out)
    page = reference_page(_schema())
    if args.out:
        atomic_write_text(args.out, page)
    else:
        print(page, end="")
    return 0


def _schema() -> type[Config]:
    from geoalign.config.schema import Config

    return Config


def _side(flat: dict[str, Any], key: str) -> str:
    return _yaml_value(flat[key]) if key in flat else "(absent)"


def _yaml_value(value: Any) -> str:
    return json.dumps(value)
