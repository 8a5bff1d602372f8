"""Does the embedded default really learn? Runs the study behind docs/learning.md, one JSON file per run.

    python profiling/studies/learning.py run --out docs/results/learning          all runs; finished ones are skipped
    python profiling/studies/learning.py table --results docs/results/learning --write docs/learning.md

Main runs: three RL seeds from the shipped base and one from each of two fresh bases. Controls: advantages shuffled
inside groups, camera gains frozen, a base trained on unbiased labels, and an oracle that divides the requested
translation by the known label bias. About 40 CPU-minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoalign.jobs.evaluate import mean_of_defined
from geoalign.report.held_out import present_names

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


def slug(name: str) -> str:
    """File name of a study."""
    return name.replace(":", "").replace(",", "").replace(" ", "_")


def geoalign(*arguments: str) -> None:
    """Run one command line of the product; its output goes to stderr on failure only."""
    done = subprocess.run([sys.executable, "-m", "geoalign", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"geoalign {' '.join(arguments)} failed:\n{done.stderr}")


def base_policy(name: str, work: Path, config: str) -> str:
    """Path of a base policy; trained here when it is not the shipped one and not there yet."""
    if name == "shipped":
        return "builtin:tiny_base"
    path = work / f"base_{name}.safetensors"
    if not path.exists():
        bias = ["pretrain.translation_bias=[0.0,0.35]", "run.seed=14"] if name == "unbiased" else [f"run.seed={name}"]
        geoalign("pretrain", "--config", config, *bias, "--out", str(path))
    return str(path)


def run_study(study: Study, out: Path, work: Path, config: str) -> None:
    """Run one study unless its result file is there."""
    result = out / f"{slug(study.name)}.json"
    if result.exists():
        return
    base = base_policy(study.base, work, config)
    if study.oracle:
        before, after = work / "oracle_before.json", work / "oracle_after.json"
        geoalign("evaluate", "--config", config, "--policy", base, "--json", str(before))
        scale = f"{math.exp(-BIAS):.6f}"
        geoalign("evaluate", "--config", config, "--policy", base, "--json", str(after), "--condition-scale", scale)
        summary = json.loads(after.read_text())
        stages = {"before": json.loads(before.read_text())["held_out"], "after": summary.pop("held_out")}
        summary["held_out_per_noise_seed"] = {k: {s: stages[s][k] for s in stages} for k in stages["before"]}
    else:
        folder = work / slug(study.name)
        overrides = [f"train.base={base}", f"run.dir={folder}", f"data.root={work / 'world'}", *study.overrides]
        geoalign("train", "--config", config, "--resume", "auto", *overrides)
        summary = json.loads((folder / "summary.json").read_text())
    summary |= {"study": study.name, "base": study.base, "overrides": list(study.overrides)}
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.rename(result)


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


def provenance(results: Path) -> str:
    """Hardware, versions and commits of the result files."""
    rows: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    devices = sorted({f"{row['device']}, {row['cores']} cores" for row in rows})
    versions = sorted({f"torch {row['versions']['torch']}, python {row['versions']['python']}" for row in rows})
    commits = sorted({row["commit"] for row in rows})
    seconds = [row["cpu_s"] for row in rows if "cpu_s" in row]
    cost = f"; an RL run took {min(seconds):.0f} to {max(seconds):.0f} CPU-seconds" if seconds else ""
    return f"Measured on {'; '.join(devices)}; {'; '.join(versions)}; commit {', '.join(commits)}{cost}."


MARK = "<!-- generated by profiling/studies/learning.py: do not edit below -->"


def write_table(results: Path, page: Path) -> None:
    """Replace everything below the mark in ``page`` by the generated table."""
    head = page.read_text().split(MARK)[0]
    page.write_text(f"{head}{MARK}\n\n{table(results)}\n\n{provenance(results)}\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "geoalign_learning_study")
    run.add_argument("--config", default="tiny_cpu")
    run.add_argument("--workers", type=int, default=2)
    show = verbs.add_parser("table")
    show.add_argument("--results", type=Path, required=True)
    show.add_argument("--write", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "table":
        write_table(args.results, args.write)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool:
        for future in [pool.submit(run_study, study, args.out, args.work, args.config) for study in STUDIES]:
            future.result()


if __name__ == "__main__":
    main()
