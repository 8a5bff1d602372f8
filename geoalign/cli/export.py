"""``geoalign export``: a trained model as a file that other inference code reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from geoalign.cli.options import add_model, examples, whole

FORMATS = ("redirector", "recammaster", "diffusers", "lora")


def add_parser(subparsers: argparse._SubParsersAction, summary: str) -> None:
    """Register ``export``."""
    shown = examples(
        "geoalign export --format redirector --model runs/single_gpu --out step.safetensors   for its inference.py",
        "geoalign export --format diffusers --model runs/tiny_cpu --out exported",
        "geoalign export --format lora --rank 32 --model runs/single_gpu --out lora.safetensors",
    )
    parser = subparsers.add_parser("export", description=summary, **shown)
    parser.add_argument("--format", required=True, choices=FORMATS, help="layout of the result")
    add_model(parser)
    parser.add_argument("--base", type=Path, help="for lora: checkpoint before training, on the same --model")
    parser.add_argument(
        "--rank", type=whole("--rank", 1), default=64, help="for lora: rank of the factors (default 64)"
    )
    parser.add_argument(
        "--dtype", choices=("keep", "bfloat16", "float32"), default="keep",
        help="bfloat16 rounds to 8 significant bits (relative error up to 2^-9); keep is exact",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file, or folder for diffusers")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from geoalign.files.atomic import atomic_write_json, atomic_write_text, check_writable
    from geoalign.jobs.model_card import model_card
    from geoalign.policy import formats, lora
    from geoalign.policy.open import describe

    manifest, beside = (args.out.with_name(args.out.name + end) for end in (".manifest.json", ".card.md"))
    check_writable(manifest)
    if args.format != "diffusers":
        check_writable(beside)
        check_writable(args.out, formats.SUFFIXES[args.format])
    loaded = None if args.dtype == "keep" else getattr(torch, args.dtype)
    files = describe(args.model, args.checkpoint)
    formats.require_camera(files.config, args.format)
    model, _ = files.network(dtype=None)
    rounding = "every bit kept" if args.dtype == "keep" else f"rounded to {args.dtype}"
    if args.format == "lora":
        rounding = f"factors in {'float32' if args.dtype == 'keep' else args.dtype}"
    card = model_card(args.model, files, layout=args.format, rounding=rounding)
    if args.format == "lora":
        base, _ = describe(args.model, args.base).network(dtype=None)
        report = lora.export_lora(base, model, args.out, args.rank, loaded or torch.float32)
        print(f"LoRA of rank {args.rank}: lossy, it leaves {report.residual:.2%} of the matrices' change (norm)")
        if report.omitted_names:
            print(
                f"{report.omitted_names} biases, norms or phase maps also changed ({report.omitted:.2%}); LoRA has none"
            )
        tensors = report.tensors
    elif args.format == "diffusers":
        tensors = formats.save_pretrained(model, args.out, loaded, files.patch, card, listing=manifest)
    elif args.format == "recammaster":
        tensors = formats.export_recammaster(model, args.out, loaded)
    else:
        tensors = formats.export_redirector(model, args.out, loaded)
    summary = formats.manifest(tensors)
    if args.format != "diffusers":
        atomic_write_json(manifest, summary)
        atomic_write_text(beside, card)
    print(f"{args.out}: {summary['tensors']} tensors, {summary['parameters']:,} parameters, {rounding}")
    return 0
