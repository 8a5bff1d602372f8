"""``geoalign train | pretrain | evaluate``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.config.load import load_config

if TYPE_CHECKING:
    from geoalign.config.schema import Config

TRAIN_EXAMPLES = """\
examples:
  geoalign train --config tiny_cpu                          the demo, a few minutes on a laptop
  geoalign train --config tiny_cpu run.seed=2 run.name=s2   another seed in another folder
  geoalign train --config tiny_cpu --resume auto            continue after a crash or Ctrl-C
  geoalign train --config paper_64xa800 --dry-run           what would run: shapes, counts, trained parameters
"""


def add_parser(subparsers: Any) -> None:
    """Add the three verbs."""
    train = _verb(subparsers, "train", "reinforcement learning of the camera", run_train, TRAIN_EXAMPLES)
    train.add_argument(
        "--resume", metavar="auto|latest|PATH", help="continue from a checkpoint (auto: if there is one)"
    )
    train.add_argument("--allow-config-change", action="store_true", help="resume although settings changed")
    train.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    pre = _verb(subparsers, "pretrain", "supervised base policy of the embedded world", run_pretrain)
    pre.add_argument("--out", type=Path, required=True, help="policy file to write (.safetensors)")
    ev = _verb(subparsers, "evaluate", "held-out camera errors of a policy", run_evaluate)
    ev.add_argument("--policy", type=Path, required=True, help="policy file, or builtin:tiny_base")
    ev.add_argument(
        "--condition-scale", type=float, default=1.0, metavar="S", help="oracle: ask for S times the motion"
    )
    ev.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")


def _verb(subparsers: Any, name: str, summary: str, run: Any, epilog: str = "") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="preset name or .yaml path (geoalign config print NAME shows it)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    parser.set_defaults(run=run)
    return parser


def _load(args: argparse.Namespace) -> Config:
    from geoalign.config.schema import Config

    return load_config(Config, args.config, args.overrides)


def run_train(args: argparse.Namespace) -> int:
    """Train; prints the held-out improvement and where the report lies."""
    config = _load(args)
    from geoalign.jobs.train import run_training

    if args.dry_run:
        return _dry_run(config)
    folder = run_training(config, resume=args.resume, allow_config_change=args.allow_config_change)
    summary = folder / "summary.json"
    if not summary.exists() or os.environ.get("RANK", "0") != "0":
        return 0
    from geoalign.cli.report import write_report

    report = write_report(folder)
    _print_comparison(json.loads(summary.read_text()))
    print(f"report: {report}")
    return 0


def _print_comparison(summary: dict[str, Any]) -> None:
    names = {"translation_error_m": "position error (m)", "rotation_error_deg": "direction error (deg)"}
    names |= {"scale_ratio": "travelled / asked", "psnr_db": "PSNR against the truth (dB)"}
    print(f"\nheld-out, mean over noise seeds{'':<14}before    after   change")
    for kind in summary["held_out"]:
        before, after = (
            {key: math.nan if value is None else value for key, value in summary["held_out"][kind][stage].items()}
            for stage in ("before", "after")
        )
        for key, title in names.items():
            change = (
                f"{after[key] - before[key]:+.2f}"
                if key in ("psnr_db", "scale_ratio")
                else f"{after[key] / before[key] - 1:+.0%}"
            )
            print(f"  {kind:<8} {title:<32} {before[key]:>8.3f} {after[key]:>8.3f} {change:>8}")


def _dry_run(config: Config) -> int:
    from geoalign.jobs.train_dry_run import describe_run

    for name, value in describe_run(config).items():
        print(f"{name:<12} {value}")
    return 0


def run_pretrain(args: argparse.Namespace) -> int:
    """Pre-train a base policy and print its held-out numbers."""
    config = _load(args)
    from geoalign.errors import UsageError
    from geoalign.io_utils import check_writable
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.jobs.pretrain import pretrain
    from geoalign.jobs.progress import bar
    from geoalign.policy.files import save_policy

    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out {args.out}: policies are read by this suffix; name a .safetensors file")
    check_writable(args.out)
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
    assert config.world is not None
    result = evaluate(policy, config.flow, HeldOut.build(config.world, config.eval), config.eval)
    notes = {
        "held_out": result.numbers,
        "seed": config.run.seed,
        "pretrain": config.pretrain.model_dump(mode="json"),
        "cpu_s": time.process_time() - began,
        **describe_environment(),
    }
    save_policy(args.out, policy, config.codec, notes)
    _print_numbers(result.numbers)
    print(f"policy: {args.out}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a policy on the held-out sets of the configuration."""
    config = _load(args)
    from geoalign.errors import ConfigError
    from geoalign.io_utils import atomic_write_json, check_writable, nan_to_none
    from geoalign.jobs.environment import describe_environment
    from geoalign.jobs.evaluate import HeldOut, evaluate
    from geoalign.policy.files import load_policy

    if config.world is None:
        raise ConfigError("evaluate needs held-out pairs with a true render: set the world section (tiny_cpu has it)")
    if args.json:
        check_writable(args.json)
    policy, _ = load_policy(args.policy)
    result = evaluate(
        policy, config.flow, HeldOut.build(config.world, config.eval), config.eval, condition_scale=args.condition_scale
    )
    _print_numbers(result.numbers)
    if args.json:
        found = {"policy": str(args.policy), "held_out": result.numbers, **describe_environment()}
        atomic_write_json(args.json, nan_to_none(found))
    return 0


def _print_numbers(numbers: Any) -> None:
    for kind, rows in numbers.items():
        print(kind)
        for name, values in rows.items():
            spread = f" (noise seeds {', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else ""
            print(f"  {name:<28} {sum(values) / len(values):8.3f}{spread}", file=sys.stdout)
