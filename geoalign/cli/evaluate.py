"""``geoalign evaluate``."""

from __future__ import annotations

import argparse
from typing import Any

from geoalign.cli.options import (
    add_config,
    add_json,
    add_model,
    check_json,
    examples,
    positive,
    print_held_out,
    read_config,
    write_json,
)


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``evaluate``."""
    shown = examples(
        "geoalign evaluate --config tiny_cpu --model runs/tiny_cpu",
        "geoalign evaluate --config tiny_cpu --model runs/tiny_cpu/checkpoints/step_000020 --json half.json",
        "geoalign evaluate --config tiny_cpu --model builtin:tiny_base --condition-scale 0.75   an oracle of the scale",
    )
    parser = subparsers.add_parser("evaluate", description=summary, **shown)
    add_config(parser)
    add_model(parser)
    parser.add_argument(
        "--condition-scale",
        type=positive("--condition-scale"),
        default=1.0,
        metavar="S",
        help="oracle: ask for S times the motion",
    )
    add_json(parser, "the numbers")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a policy on the held-out sets of the configuration."""
    config = read_config(args)
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.jobs.progress import bar
    from geoalign.policy.open import open_policy

    check_json(args)
    held_out = HeldOut.build(config)
    policy = open_policy(args.model, args.checkpoint)
    total = len(config.eval.noise_seeds) * sum(len(pairs.batch) for pairs in held_out.sets.values())
    with bar(total, "evaluating", "video") as shown:
        result = evaluate(policy, config, held_out, condition_scale=args.condition_scale, progress=shown.update)
    named = {"model": str(args.model), "checkpoint": args.checkpoint and str(args.checkpoint)}
    if write_json(args, named | {"held_out": result.numbers, **describe_environment()}):
        print_held_out(result.numbers)
    return 0
