"""docs/reliability.md, written from the campaign's result file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geoalign.files.atomic import atomic_write_text

WHAT = {
    "kills": "SIGKILL before file operations, spread evenly over a verb and random, some in a safetensors file",
    "full_disks": "no new file from a random operation on, or no file beyond a size, which reaches inside libraries",
    "read_only": "no change of the disk from a random operation on",
    "double_signals": "two SIGTERM in training, 0, 0.05, 0.3 and 2 s apart",
    "two_processes": "one writer stopped at a random operation while a second one starts in the same place",
    "dying_ranks": "one of two ranks of training killed at a random moment, DDP and FSDP; the other is not told",
    "signalled_ranks": "two SIGTERM to both of two ranks of training, 0, 0.05, 0.3 and 2 s apart",
    "dying_preparers": "one of two processes that prepare windows killed before a random file operation",
    "dying_workers": "the process of a reward killed at a random moment, or the training that it works for",
    "inputs": "damaged files, over every reader: bits flipped, cut, doubled, spliced, replaced by traps",
}
COLUMNS = ("tried", "clear_error", "accepted_rightly", "accepted_wrongly", "traceback", "hang", "lost")
HEAD = """\
# Reliability

`make campaign` disturbs the verbs that write ({verbs}) and compares what the next run finishes with an undisturbed
run, bit for bit. A trial is a forked child of one warmed process at the smallest size; `BUDGET_S` bounds the time, and
the command goes on where the last one of the same commit stopped. What a fault does to a run stands in
[engine.md](engine.md#faults).

Every trial ends as one of: **clear error**, one line, and the next run finishes equal; **accepted rightly**, finished
equal (after a kill or a signal by the next run); **accepted wrongly**, a success that is not equal; a **traceback**; a
**hang**; **lost**, the next run fails or differs, or something temporary stays.
"""


def page(result: Mapping[str, Any], verbs: str) -> str:
    """The whole page."""
    lines = [
        HEAD.format(verbs=verbs),
        f"| campaign | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} | what |",
    ]
    lines.append(f"| --- {'| --- ' * (len(COLUMNS) + 1)}|")
    for name, counts in result["campaigns"].items():
        numbers = " | ".join(f"{counts[column]:,}" for column in COLUMNS)
        lines.append(f"| {name.replace('_', ' ')} | {numbers} | {WHAT[name]} |")
    made = (
        f"{result['device']}, {result['cores']} cores, torch {result['versions']['torch']}, "
        f"commit {', '.join(result['commits'])}"
    )
    lines += ["", f"{made}; {result['seconds'] / 60:.0f} minutes."]
    tried = {name: counts["tried"] for name, counts in result["campaigns"].items()}
    short = [f"{name.replace('_', ' ')} {tried.get(name, 0):,} of {n:,}" for name, n in result["wanted"].items()
             if tried.get(name, 0) < n]  # fmt: skip
    if short:
        lines += ["", f"**Not complete**, the time was over: {', '.join(short)}."]
    if result["problems"]:
        lines += ["", "Not as wanted:", ""]
        for problem in result["problems"]:
            what = problem["what"].strip().splitlines()
            lines.append(f"- {problem['campaign']} {problem['number']}, {problem['kind']}: {what[0] if what else ''}")
    return "\n".join(lines) + "\n"


def write_page(result: Path, path: Path) -> None:
    """Write the page of a result file."""
    from verbs import VERBS

    atomic_write_text(path, page(json.loads(result.read_text()), ", ".join(f"`{verb.name}`" for verb in VERBS)))
