"""Does the embedded default really learn? The runs behind docs/learning.md, one JSON file each.

Main runs: three RL seeds from the shipped base and one from each of two fresh bases. Controls: advantages shuffled
inside groups, camera gains frozen, a base trained on unbiased labels, and an oracle that divides the requested
translation by the known label bias. About 40 CPU-minutes; `make results` (``results.py``) runs them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import config_settings, fingerprint, shipped_base, write_result

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.evaluate import METRICS, mean_of_defined
from geoalign.jobs.prepare import render_missing_data
from geoalign.report.held_out import present_names

RESULTS, PAGE = Path("docs/results/learning"), Path("docs/learning.md")
BIAS = 0.34  # mean log factor of the label bias in pretrain.translation_bias


@dataclass(frozen=True)
class Study:
    """One row of the table: a base, and what RL does with it."""

    name: str
    base: str
    overrides: tuple[str, ...] = ()
    oracle: bool = False


STUDIES = (
    Study("shipped base, RL seed 1", "shipped", ("run.seed=1",)),
    Study("shipped base, RL seed 2", "shipped", ("run.seed=2",)),
    Study("shipped base, RL seed 3", "shipped", ("run.seed=3",)),
    Study("fresh base 12, RL seed 1", "12", ("run.seed=1",)),
    Study("fresh base 13, RL seed 1", "13", ("run.seed=1",)),
    Study("control: advantages shuffled", "shipped", ("run.seed=1", "train.shuffle_advantages=true")),
    Study(
        "control: camera gains frozen",
        "shipped",
        ("run.seed=1", r"optim.trainable='\.self_attn\.(?!camera_gain)'", "optim.groups=[]"),
    ),
    Study("control: base with unbiased labels", "unbiased", ("run.seed=1",)),
    Study("control: oracle scale, no RL", "shipped", oracle=True),
)


# How a base that does not ship is pre-trained.
BASES = {
    "12": ("run.seed=12",),
    "13": ("run.seed=13",),
    "unbiased": ("pretrain.translation_bias=[0.0,0.35]", "run.seed=14"),
}


def slug(name: str) -> str:
    """File name of a study, without a suffix."""
    return name.replace(":", "").replace(",", "").replace(" ", "_")


def settings(study: Study, config: str) -> dict[str, Any]:
    """What the result of a study depends on."""
    base = shipped_base() if study.base == "shipped" else config_settings(config, BASES[study.base])
    scale = {"condition_scale": math.exp(-BIAS)} if study.oracle else {}
    return {**config_settings(config, study.overrides), "base": base, "metrics": METRICS, **scale}


def geoalign(*arguments: str) -> None:
    """Run one command line of the product; its output goes to stderr on failure only."""
    done = subprocess.run([sys.executable, "-m", "geoalign", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"geoalign {' '.join(arguments)} failed:\n{done.stderr}")


def base_policy(name: str, work: Path, config: str) -> str:
    """Path of a base policy; trained here when it is not the shipped one and not there yet."""
    if name == "shipped":
        return "builtin:tiny_base"
    path = work / f"base_{name}_{fingerprint(config_settings(config, BASES[name]))}.safetensors"
    if not path.exists():
        geoalign("pretrain", "--config", config, *BASES[name], "--out", str(path))
    return str(path)


def render_world(work: Path, config: str) -> Path:
    """The world that all runs read, rendered before the first of them: two that start at once would both write it."""
    loaded = load_config(Config, config)
    root = work / f"world_{fingerprint({'world': loaded.world, 'data': loaded.data})}"
    render_missing_data(load_config(Config, config, [f"data.root={root}"]), 0)
    return root


def run_study(study: Study, result: Path, work: Path, config: str) -> None:
    """Run one study and write its result file; an interrupted run is continued."""
    base, made_with = base_policy(study.base, work, config), settings(study, config)
    if study.oracle:
        before, after = work / "oracle_before.json", work / "oracle_after.json"
        geoalign("evaluate", "--config", config, "--model", base, "--json", str(before))
        scale = f"{math.exp(-BIAS):.6f}"
        geoalign("evaluate", "--config", config, "--model", base, "--json", str(after), "--condition-scale", scale)
        summary = json.loads(after.read_text())
        stages = {"before": json.loads(before.read_text())["held_out"], "after": summary.pop("held_out")}
        summary["held_out_per_noise_seed"] = {k: {s: stages[s][k] for s in stages} for k in stages["before"]}
    else:
        folder, world = work / f"{slug(study.name)}_{fingerprint(made_with)}", render_world(work, config)
        overrides = [f"train.base={base}", f"run.dir={folder}", f"data.root={world}", *study.overrides]
        geoalign("train", "--config", config, "run.ranks=1", "--resume", "auto", *overrides)  # studies share the cores
        summary = json.loads((folder / "summary.json").read_text())
    summary |= {"study": study.name, "base": study.base, "overrides": list(study.overrides)}
    write_result(result, summary, made_with)


def table(results: Path) -> str:
    """Markdown table of all result files: before -> after per kind, mean and range over noise seeds."""
    lines = [
        "| run | set | position error (m) | change | rotation error (deg) | PSNR (dB) | 2nd evaluator "
        "| scale ratio | translation gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for study in STUDIES:
        path = results / f"{slug(study.name)}.json"
        if not path.exists():
            lines.append(f"| {study.name} | | not run | | | | | | |")
            continue
        summary = json.loads(path.read_text())
        for kind in ("presets", "random"):
            lines.append(f"| {study.name} | {kind} | {_cells(summary['held_out_per_noise_seed'][kind])} |")
    return "\n".join(lines)


def _cells(stages: dict[str, dict[str, list[float]]]) -> str:
    mean = {stage: {m: mean_of_defined(v) for m, v in present_names(rows).items()} for stage, rows in stages.items()}
    before, after = mean["before"], mean["after"]
    spread = max(stages["after"]["translation_error_m"]) - min(stages["after"]["translation_error_m"])
    relative = after["translation_error_m"] / before["translation_error_m"] - 1
    second = after["second_translation_error_m"] / before["second_translation_error_m"] - 1
    return " | ".join(
        (
            f"{before['translation_error_m']:.3f} -> {after['translation_error_m']:.3f} (spread {spread:.3f})",
            f"{relative:+.0%}",
            f"{before['rotation_error_deg']:.2f} -> {after['rotation_error_deg']:.2f}",
            f"{before['psnr_db']:.1f} -> {after['psnr_db']:.1f}",
            f"{second:+.0%}",
            *(
                f"{before.get(m, math.nan):.2f} -> {after.get(m, math.nan):.2f}"
                for m in ("scale_ratio", "translation_gain")
            ),
        )
    )


def page(root: Path) -> str:
    """The generated part of the page, from the result files alone."""
    return f"{table(root / RESULTS)}\n\n{provenance(root / RESULTS)}"


def provenance(results: Path) -> str:
    """Hardware, versions and commits of the result files."""
    rows: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    devices = sorted({f"{row['device']}, {row['cores']} cores" for row in rows})
    versions = sorted({f"torch {row['versions']['torch']}, python {row['versions']['python']}" for row in rows})
    commits = sorted({row["commit"] for row in rows})
    seconds = [row["cpu_s"] for row in rows if "cpu_s" in row]
    cost = f"; an RL run took {min(seconds):.0f} to {max(seconds):.0f} CPU-seconds" if seconds else ""
    return f"Measured on {'; '.join(devices)}; {'; '.join(versions)}; commit {', '.join(commits)}{cost}."
