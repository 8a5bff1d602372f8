"""The model card that lies with an export: base and its licence, settings, numbers with their spread, commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geoalign.files.checkpoints import iteration_of
from geoalign.files.parsing import read_text
from geoalign.files.yaml_text import MAX_YAML
from geoalign.models.layouts import RECAMMASTER, REDIRECTOR
from geoalign.policy.files import RUN_CONFIG
from geoalign.policy.open import ModelFiles
from geoalign.report.held_out import Value, comparisons
from geoalign.report.run_folder import read_summary
from geoalign.report.words import SETS
from geoalign.version import __version__

_WHAT = "Give it a source video and a camera path, and it returns the same scene filmed along that path."
_EMBEDDED = (
    "It knows the small rendered world of geoalign's demo alone: a model to try the method with, and not one for real "
    "videos."
)
_BESIDE = "geoalign sample --model BASE --checkpoint FILE --video in.mp4 --trajectory pan_right --out out.mp4"
_USE = {
    "diffusers": "geoalign sample --model FOLDER --video in.mp4 --trajectory pan_right --out out.mp4",
    "redirector": _BESIDE,
    "recammaster": _BESIDE,
}
"""How an export of a layout is sampled from; a LoRA is for other programs."""
_NOT_KNOWN = "not known to geoalign: state that of the weights you trained on"
_PUBLISHED = (
    (REDIRECTOR, "Apache-2.0 (code of ReDirector and Wan2.1; see the files you downloaded)"),
    (RECAMMASTER, "MIT (code of ReCamMaster) on Apache-2.0 (Wan2.1; see the files you downloaded)"),
)


def model_card(name: Path | str, files: ModelFiles, *, layout: str, rounding: str) -> str:
    """Markdown, with the metadata block that model hubs read.

    Args:
        name: what was exported, as :func:`geoalign.policy.open.describe` took it.
        files: its files.
        layout: the format of the export.
        rounding: what became of the bits, in words.

    Raises:
        DataError: the run's ``summary.json`` or settings are damaged; what a sound one does not tell is left out.
    """
    run = _run_of(Path(name))
    summary = _summary(run, Path(name))
    base = str(summary.get("base") or files.notes.get("base") or files.location.home)
    licence = _licence(base, files)
    lines = [
        "---", "library_name: geoalign", "pipeline_tag: video-to-video", "tags: [camera-control, grpo]",
        f"license: {'apache-2.0' if licence.startswith('Apache-2.0') else 'other'}", "---", "",
        "# A retake model", "",
        f"{_WHAT} {_EMBEDDED}" if _ships(base) else _WHAT, "",
        f"{files.title[:1].upper()}{files.title[1:]}, written by `geoalign export --format {layout}`; {rounding}.", "",
        *([f"    {_USE[layout]}", ""] if layout in _USE else []),
        "| what | value |", "| --- | --- |",
        f"| trained on top of | `{base}` |",
        f"| licence of the base | {licence} |",
        f"| exported from | {files.location.what} |",
        f"| geoalign | {__version__} |",
        f"| commit of the training | {summary.get('commit', 'not recorded')} |",
    ]  # fmt: skip
    lines += [f"| {key} | {summary[key]} |" for key in ("seed", "iterations") if summary.get(key) is not None]
    return "\n".join([*lines, *_numbers(summary), *_settings(run, files), ""])


def _run_of(path: Path) -> Path | None:
    """The run folder that was named, or that a checkpoint or policy file lies in."""
    parents = (path, path.parent if iteration_of(path) is None else path.parent.parent)
    return next((folder for folder in parents if (folder / RUN_CONFIG).is_file()), None)


def _summary(run: Path | None, name: Path) -> dict[str, Any]:
    """What the end of the run said; of an earlier checkpoint without its numbers, which were measured on the last."""
    summary = {} if run is None else read_summary(run)
    if (iteration := iteration_of(name)) is not None:
        summary = {key: summary[key] for key in ("base", "commit", "seed") if key in summary}
        summary["iterations"] = iteration
    return summary


def _ships(base: str) -> bool:
    """Whether the base is the one inside the package."""
    return base.startswith("builtin:") or "_assets" in base


def _licence(base: str, files: ModelFiles) -> str:
    if _ships(base):
        return "Apache-2.0 (ships with geoalign)"
    return next((licence for config, licence in _PUBLISHED if config == files.config), _NOT_KNOWN)


def _numbers(summary: dict[str, Any]) -> Iterator[str]:
    """Held-out metrics before and after, with their deviation over noise seeds."""
    yield from ("", "## Held-out metrics", "")
    if not summary.get("held_out"):
        yield "None were recorded with these weights."
        return
    yield "Mean over held-out pairs; \N{PLUS-MINUS SIGN} is the deviation over noise seeds, where there are several."
    for kind in summary["held_out"]:
        yield from ("", f"### {SETS.get(kind, kind)}", "", "| metric | before | after |", "| --- | --- | --- |")
        for row in comparisons(summary, kind):
            unit = f" ({row.metric.unit})" if row.metric.unit else ""
            yield f"| {row.metric.title}{unit} | {_cell(row.before)} | {_cell(row.after)} |"


def _cell(value: Value) -> str:
    return f"{value.mean:.3f}" + ("" if value.spread is None else f" \N{PLUS-MINUS SIGN} {value.spread:.3f}")


def _settings(run: Path | None, files: ModelFiles) -> Iterator[str]:
    yield from ("", "## Settings", "")
    if run is not None:
        yield from ("```yaml", read_text(run / RUN_CONFIG, limit=MAX_YAML).rstrip(), "```")
        return
    found = {"model": files.config.model_dump(mode="json"), "notes": dict(files.notes)}
    yield from ("```json", json.dumps(found, indent=2), "```")
