"""``geoalign evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, add_json, check_json, print_held_out, read_config, write_json


def add_parser(subparsers: Any) -> None:
    """Add ``evaluate``."""
    summary = "held-out camera errors of a policy"
    parser = subparsers.add_parser("evaluate", help=summary, description=summary)
    add_config(parser)
    parser.add_argument("--policy", type=Path, required=True, help="policy file, or builtin:tiny_base")
    parser.add_argument(
        "--condition-scale", type=float, default=1.0, metavar="S", help="oracle: ask for S times the motion"
    )
    add_json(parser, "the numbers")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a policy on the held-out sets of the configuration."""
    config = read_config(args)
    from geoalign.errors import ConfigError
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.policy.files import load_policy

    if config.world is None:
        raise ConfigError("evaluate needs held-out pairs with a true render: set the world section (tiny_cpu has it)")
    check_json(args)
    policy, _ = load_policy(args.policy)
    result = evaluate(
        policy, config.flow, HeldOut.build(config.world, config.eval), config.eval, condition_scale=args.condition_scale
    )
    if write_json(args, {"policy": str(args.policy), "held_out": result.numbers, **describe_environment()}):
        print_held_out(result.numbers)
    return 0
