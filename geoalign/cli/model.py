"""``geoalign model``: what a checkpoint is, without reading its weights."""

from __future__ import annotations

import argparse

from geoalign.cli.options import add_json, check_json, examples, write_json


def add_parser(subparsers: argparse._SubParsersAction, summary: str) -> None:
    """Register ``model manifest`` and ``model fingerprint``."""
    layouts = examples("geoalign model manifest", "geoalign model manifest --layout redirector --json redirector.json")
    files = examples(
        "geoalign model fingerprint weights/redirector/step20000.safetensors",
        "geoalign model fingerprint runs/tiny_cpu",
    )
    both = examples("geoalign model manifest", "geoalign model fingerprint runs/tiny_cpu")
    parser = subparsers.add_parser("model", description=summary, **both)
    verbs = parser.add_subparsers(dest="model_verb", required=True, metavar="VERB")
    manifest = verbs.add_parser("manifest", help="tensors and parameters of every published layout", **layouts)
    add_json(manifest, "it")
    manifest.add_argument("--layout", help="list every tensor of one layout with its shape")
    manifest.set_defaults(run=_manifest)
    finger = verbs.add_parser("fingerprint", help="say which published model a file or folder belongs to", **files)
    finger.add_argument(
        "path", metavar="MODEL", help="a weight file, a folder of shards, or anything that --model takes"
    )
    add_json(finger, "it")
    finger.set_defaults(run=_fingerprint)


def _manifest(args: argparse.Namespace) -> int:
    from geoalign.errors import UsageError
    from geoalign.models.layouts import LAYOUTS, count, fingerprint

    check_json(args)
    if args.layout is not None:
        if args.layout not in LAYOUTS:
            raise UsageError(f"unknown layout {args.layout!r}; there are: {', '.join(LAYOUTS)}")
        shapes = LAYOUTS[args.layout].shapes()
        if write_json(args, shapes):
            print("\n".join(f"{name}  {list(shape)}" for name, shape in shapes.items()))
        return 0
    table = {
        name: {**count(layout.shapes()), "fingerprint": fingerprint(layout.shapes()), "title": layout.title}
        for name, layout in LAYOUTS.items()
    }
    if write_json(args, table):
        for name, row in table.items():
            print(f"{name:30} {row['tensors']:5} tensors {row['parameters']:>15,} parameters  {row['title']}")
    return 0


def _fingerprint(args: argparse.Namespace) -> int:
    from geoalign.models.checkpoint import layout_of
    from geoalign.models.layouts import LAYOUTS, count, fingerprint, identify
    from geoalign.policy.open import tensor_shapes

    check_json(args)
    shapes = tensor_shapes(args.path)
    layout = layout_of(shapes)
    nearest, share = identify(shapes)
    row = {
        "path": args.path,
        **count(shapes),
        "fingerprint": fingerprint(shapes),
        "layout": None if layout is None else layout.name,
        "nearest": nearest or None,
        "agreement": round(share, 4),
    }
    if not write_json(args, row):
        return 0
    print(f"{row['tensors']} tensors, {row['parameters']:,} parameters, fingerprint {row['fingerprint']}")
    nearest_title = LAYOUTS[nearest].title if nearest else "none"
    print(layout.title if layout else f"no published layout; nearest is {nearest_title} ({share:.0%} of tensors agree)")
    return 0
