"""The tables of docs/learning.md, from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rungs
import time_to_quality_tables
from learning import ABLATION, ORACLES, RESULTS, STUDIES, Study, slug
from oracles import STAGES

from geoalign.jobs.evaluation_table import AXIS_METRICS, mean_of_defined

PAGE = Path("docs/learning.md")
KINDS = ("presets", "random")
_REQUESTS = {
    "plain": "as it is",
    "single": "best single factor",
    "axis": "best per axis",
    "frame": "best per axis and frame",
}
_ABLATED = {
    "explained share": ("explained_share", 2),
    "RotErr (deg)": ("rot_err_deg", 2),
    "TransErr": ("trans_err", 3),
    "position (m)": ("translation_error_m", 3),
    "rotation (deg)": ("rotation_error_deg", 2),
    "gain": ("translation_gain", 2),
    "PSNR along its own camera (dB)": ("own_camera_psnr_db", 1),
    "gradients": ("gradient_energy", 2),
    "PSNR to the truth (dB)": ("psnr_db", 1),
}
"""Columns of table 3, in the paper's order: consistency, camera accuracy, picture; metric and digits of each."""
_CAMERA_BY_BOTH = (
    "translation_error_m", "rotation_error_deg", "second_translation_error_m", "second_rotation_error_deg",
)  # fmt: skip
Numbers = Mapping[str, Mapping[str, list[float | None]]]
"""Values over noise seeds by kind and metric."""


def page(root: Path) -> str:
    """The generated part of the page."""
    results = root / RESULTS
    parts = (
        ("What factors on the request could mend", oracle_table(results)),
        ("What RL learns", error_table(results)),
        ("Travelled over asked, and the picture", axis_table(results)),
        ("By frame", frame_table(results)),
        ("Table 3 on the embedded default: ablation of the geometry reward", ablation_table(results)),
        ("Time to quality", time_to_quality_tables.table(root)),
        ("Learning with each rung of the ladder", rungs.table(root)),
    )
    tables = "\n\n".join(f"**{title}**\n\n{table}" for title, table in parts)
    return f"{tables}\n\n{provenance(results)}"


def _read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{slug(name)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; a row that is too short is filled up."""
    filled = [row + ("",) * (len(head) - len(row)) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *filled))


def _mean(numbers: Numbers, metric: str, kind: str = "") -> float:
    """Mean over noise seeds of one kind, or of all kinds."""
    return mean_of_defined(mean_of_defined(numbers[k][metric]) for k in ((kind,) if kind else KINDS))


def _both(numbers: Numbers, metric: str, digits: int) -> str:
    return " / ".join(f"{_mean(numbers, metric, kind):.{digits}f}" for kind in KINDS)


def _stage(result: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {kind: result["held_out_per_noise_seed"][kind][stage] for kind in KINDS}


def _gains(numbers: Numbers) -> str:
    return ", ".join(f"{_mean(numbers, metric):.2f}" for metric in AXIS_METRICS)


def oracle_table(results: Path) -> str:
    """The oracles of every base."""
    measured = {
        "position error (m)": ("translation_error_m", 3),
        "rotation error (deg)": ("rotation_error_deg", 2),
        "last frame (m)": ("last_translation_error_m", 3),
        "PSNR (dB)": ("psnr_db", 1),
    }
    rows = []
    for base, name in ORACLES.items():
        title = "shipped" if base == "shipped" else f"fresh, {base}"
        if (result := _read(results, name)) is None:
            rows.append((title, "not run"))
            continue
        for stage in STAGES:
            numbers, factors = _stage(result, stage), _factors(stage, result["factors"])
            errors = (_both(numbers, metric, digits) for metric, digits in measured.values())
            rows.append((title, _REQUESTS[stage], factors, *errors))
    return _table(("base", "request", "factors (sideways, forward, vertical, yaw)", *measured), rows)


def _factors(stage: str, factors: Mapping[str, Any]) -> str:
    def listed(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    if stage == "single":
        return f"{factors[stage]:.2f} on the translation"
    if stage == "frame":
        return f"{listed(factors[stage][1])} at first, {listed(factors[stage][-1])} at last"
    return listed(factors.get(stage, []))


def error_table(results: Path) -> str:
    """Errors before and after every run, beside the oracles of its base."""
    head = (
        "run",
        "position error (m)",
        "change",
        "spread (m)",
        "beside the best single factor",
        "beside the best per axis",
        "rotation error (deg)",
        "last frame (m)",
        "PSNR (dB)",
        "2nd evaluator",
    )
    rows = []
    for study in STUDIES:
        if (result := _read(results, study.name)) is None:
            rows.append((study.name, "not run"))
            continue
        before, after = _stage(result, "before"), _stage(result, "after")
        second = "second_translation_error_m"
        cells = (
            _arrow(before, after, "translation_error_m", 3),
            _change(before, after, "translation_error_m"),
            " / ".join(f"{_spread(after[kind]['translation_error_m']):.3f}" for kind in KINDS),
            *(_beside(results, study, after, stage) for stage in ("single", "axis")),
            f"{_arrow(before, after, 'rotation_error_deg', 2)} ({_change(before, after, 'rotation_error_deg')})",
            f"{_arrow(before, after, 'last_translation_error_m', 3)} "
            f"({_change(before, after, 'last_translation_error_m')})",
            _arrow(before, after, "psnr_db", 1),
            _change(before, after, second),
        )
        rows.append((study.name, *cells))
    return _table(head, rows)


def _arrow(before: Numbers, after: Numbers, metric: str, digits: int) -> str:
    return f"{_both(before, metric, digits)} -> {_both(after, metric, digits)}"


def _change(before: Numbers, after: Numbers, metric: str) -> str:
    return f"{_mean(after, metric) / _mean(before, metric) - 1:+.0%}"


def _spread(values: list[float | None]) -> float:
    defined = [value for value in values if value is not None]
    return max(defined) - min(defined)


def _beside(results: Path, study: Study, after: Numbers, stage: str) -> str:
    """How far the position error after training lies above (+) or below (-) an oracle of the same base."""
    result = _read(results, ORACLES[study.base]) if study.base in ORACLES else None
    return "" if result is None else _change(_stage(result, stage), after, "translation_error_m")


def axis_table(results: Path) -> str:
    """Travelled over asked along each axis, and the quality of the picture."""
    pictures = ("own_camera_psnr_db", "explained_share", "gradient_energy")
    head = ("run", "sideways", "forward", "vertical", "yaw", "PSNR along its own camera (dB)", "explained", "gradients")
    rows = []
    for study in STUDIES:
        if (result := _read(results, study.name)) is None:
            rows.append((study.name, "not run"))
            continue
        stages = _stage(result, "before"), _stage(result, "after")
        digits = dict.fromkeys((*AXIS_METRICS, *pictures), 2) | {"own_camera_psnr_db": 1}
        cells = (" -> ".join(f"{_mean(s, metric):.{d}f}" for s in stages) for metric, d in digits.items())
        rows.append((study.name, *cells))
    return _table(head, rows)


def frame_table(results: Path) -> str:
    """Errors of every frame: the shipped base, its oracles, and its first RL seed."""
    rows: list[tuple[str, ...]] = []
    oracle, run = _read(results, ORACLES["shipped"]), _read(results, STUDIES[0].name)
    found = {} if oracle is None else {_REQUESTS[stage]: oracle["by_frame"][stage] for stage in STAGES}
    if run is not None:
        found["RL seed 1"] = run["by_frame"]["after"]
    frames = max((len(row["translation_error_m"]) for row in found.values()), default=0)
    for metric, unit, digits in (("translation_error_m", "m", 2), ("rotation_error_deg", "deg", 2)):
        what = metric.split("_")[0].replace("translation", "position")
        rows += [
            (f"{name}, {what} ({unit})", *(f"{value:.{digits}f}" for value in row[metric]))
            for name, row in found.items()
        ]
    return _table(("frame", *map(str, range(1, frames + 1))), rows)


def ablation_table(results: Path) -> str:
    """The base, and what each reward of :data:`learning.ABLATION` makes of it, in the order of the paper's table 3.

    A cell is a mean over training seeds, noise seeds and kinds, with the range over training seeds in brackets. Below
    stands for how many seeds both camera errors fell, by both evaluators, and what has not been run.
    """
    found = {reward: [run for n in names if (run := _read(results, n))] for reward, names in ABLATION.items()}
    rows, fell = [], []
    for run in [run for runs in found.values() for run in runs][:1]:
        rows.append(
            ("none (the base)", *(_over_seeds([_stage(run, "before")], *column) for column in _ABLATED.values()))
        )
    for reward, runs in found.items():
        after = [_stage(run, "after") for run in runs]
        cells = [_over_seeds(after, *column) for column in _ABLATED.values()] if runs else ["not run"]
        rows.append((f"{reward}, {_seeds(runs)}", *cells))
        count = sum(all(_mean(_stage(run, "after"), metric) < _mean(_stage(run, "before"), metric)
                        for metric in _CAMERA_BY_BOTH) for run in runs)  # fmt: skip
        fell.append(f"{reward}: in {count} of {_seeds(runs)}")
    left = "; ".join(name for names in ABLATION.values() for name in names if _read(results, name) is None)
    told = f"Position and rotation error fell, by both evaluators; {'; '.join(fell)}."
    return f"{_table(('reward', *_ABLATED), rows)}\n\n{told}{f' Not run: {left}.' if left else ''}"


def _seeds(runs: list[dict[str, Any]]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) != 1)}"


def _over_seeds(runs: list[dict[str, Any]], metric: str, digits: int) -> str:
    """Mean over the training seeds, and their range where there are several."""
    values = [_mean(run, metric) for run in runs]
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean_of_defined(values):.{digits}f}{spread}"


def provenance(results: Path) -> str:
    """Hardware, versions and commits of the result files."""
    rows: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    devices = sorted({f"{row['device']}, {row['cores']} cores" for row in rows})
    versions = sorted({f"torch {row['versions']['torch']}, python {row['versions']['python']}" for row in rows})
    commits = sorted({row["commit"] for row in rows})
    seconds = [row["cpu_s"] for row in rows if "cpu_s" in row]
    cost = f"; an RL run took {min(seconds):.0f} to {max(seconds):.0f} CPU-seconds" if seconds else ""
    return f"Measured on {'; '.join(devices)}; {'; '.join(versions)}; commit {', '.join(commits)}{cost}."
