"""CPU seconds an iteration of every way to run in time_to_quality.py, in turns: part of docs/learning.md.

Learning curves are made beside other work, where an iteration takes up to a third longer and not the same at all times.
So their abscissa is iterations, and what one takes is measured here, with the machine to itself. About twenty minutes.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import levers
import time_to_quality as timed
from record import Scale, write_result

RESULT = Path("docs/results/time_to_quality/pace.json")
PERIOD = 50
"""Timed iterations, as many as there are from one audit to the next."""


def _changed(scale: Scale) -> dict[str, tuple[str, ...]]:
    return {arm: timed.overrides(arm, 1, scale) for arm in timed.ARMS}


def settings(scale: Scale) -> dict[str, Any]:
    """What the result depends on."""
    made_of = {arm: timed.settings(changed) for arm, changed in _changed(scale).items()}
    return {"arms": made_of, "repeats": scale.repeats * PERIOD // 5}


def run(result: Path, scale: Scale) -> None:
    """Time all of them in turns in one process."""
    made_with = settings(scale)
    options = ["--config", timed.CONFIG, "--repeats", str(made_with["repeats"])]
    for arm, changed in _changed(scale).items():
        options += ["--setting", arm, shlex.join(changed)]
    found = levers.bench(options, result)
    kept = ("levers", "cpu_s_mean", "seconds_p20", "seconds_p80")
    rows = [{name: row[name] for name in kept} for row in found["settings"]]
    write_result(result, {"settings": rows, "environment": found["environment"]}, made_with)


def seconds(root: Path) -> dict[str, float]:
    """Mean CPU seconds of an iteration by arm; empty before they were measured."""
    found = timed.read(root / RESULT) or {"settings": []}
    return {row["levers"]: row["cpu_s_mean"] for row in found["settings"]}
