"""What the exact levers save on the embedded model: the table of docs/engine.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import config_settings, shipped_base, write_result

RESULT, PAGE = Path("profiling/results/bench_levers-cpu.json"), Path("docs/engine.md")
BENCHMARK = Path(__file__).parents[1] / "model" / "bench_iteration.py"


def settings(config: str, repeats: int) -> dict[str, Any]:
    """What the result depends on."""
    return {**config_settings(config), "repeats": repeats, "base": shipped_base()}


def run(result: Path, config: str, repeats: int) -> None:
    """Time both settings in a process of its own, which needs the machine for itself."""
    found = bench(["--config", config, "--repeats", str(repeats)], result)
    write_result(result, found, settings(config, repeats))


def bench(options: Sequence[str], result: Path) -> dict[str, Any]:
    """What the benchmark of iterations writes into ``result``, in a process of its own."""
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(result.read_text())


def page(root: Path) -> str:
    """The table, from the result file alone."""
    result = json.loads((root / RESULT).read_text())
    lines = [
        "| levers | seconds an iteration (20 to 80 %) | forward equivalents, counted | predicted |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["settings"]:
        seconds = f"{row['seconds_median']:.2f} ({row['seconds_p20']:.2f} to {row['seconds_p80']:.2f})"
        counts = f"{row['forward_equivalents']:.0f} | {row['predicted_forward_equivalents']:.0f}"
        lines.append(f"| {row['levers']} | {seconds} | {counts} |")
    where = result["environment"]
    shape = f"T = {result['steps']}, window of {result['window']} from step {result['start']}, G = {result['group']}"
    made = f"{where['device']}, {where['cores']} cores, commit {where['commit']}"
    return "\n".join(lines) + f"\n\nThe embedded model with the paper's sampler and group ({shape}); {made}."
