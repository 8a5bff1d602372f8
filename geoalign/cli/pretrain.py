"""``geoalign pretrain``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, examples, print_held_out, read_config


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``pretrain``."""
    shown = examples(
        "geoalign pretrain --config tiny_cpu --out base.safetensors",
        "geoalign train --config tiny_cpu train.base=base.safetensors",
    )
    parser = subparsers.add_parser("pretrain", description=summary, **shown)
    add_config(parser)
    parser.add_argument("--out", type=Path, required=True, help="policy file to write (.safetensors)")
    parser.set_defaults(run=run_pretrain)


def run_pretrain(args: argparse.Namespace) -> int:
    """Pre-train a base policy and print its held-out numbers."""
    config = read_config(args)
    from geoalign.errors import UsageError
    from geoalign.files.atomic import check_writable, nan_to_none
    from geoalign.jobs.progress import bar, say

    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out {args.out}: policies are read by this suffix; name a .safetensors file")
    check_writable(args.out)
    say(f"pretrain: {config.pretrain.steps:,} steps on {config.pretrain.pool:,} pairs")
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.jobs.pretrain import pretrain
    from geoalign.policy.files import save_policy

    if config.run.threads:
        import torch

        torch.set_num_threads(config.run.threads)
    began = time.process_time()
    with (
        bar(config.pretrain.pool, "rendering pairs", "pair") as rendered,
        bar(config.pretrain.steps, "pre-training", "step") as steps,
    ):

        def on_step(step: int, loss: float) -> None:
            steps.update()
            steps.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        policy = pretrain(config, on_step, rendered.update)
    result = evaluate(policy, config, HeldOut.build(config))
    notes = {
        "held_out": nan_to_none(result.numbers),
        "seed": config.run.seed,
        "pretrain": config.pretrain.model_dump(mode="json"),
        "cpu_s": time.process_time() - began,
        **describe_environment(),
    }
    save_policy(args.out, policy, config.codec, notes)
    print_held_out(result.numbers)
    print(f"policy: {args.out}")
    return 0
