"""Compose the report of a run: one HTML file that needs no network, readable by someone new to the project."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from geoalign.errors import UsageError
from geoalign.files.atomic import atomic_write_text, check_writable
from geoalign.files.checkpoints import CHANGED
from geoalign.report.curves import curves_section, phases_section
from geoalign.report.document import document
from geoalign.report.results import headline, lead, results_section, worse_numbers
from geoalign.report.run_folder import RunRecord, is_live, read_run
from geoalign.report.samples import samples_section, training_section
from geoalign.report.state import RunState, duration, progress_section
from geoalign.report.troubles import fallback, findings, troubles_section
from geoalign.report.what import told_changes, what_section
from geoalign.version import __version__

REFRESH_S = 20
"""Seconds after which the page of a live run loads itself anew, and after which ``--follow`` writes it again."""


def report_page(run: RunRecord, samples: int = 4) -> str:
    """Return the whole HTML document.

    Args:
        run: what :func:`geoalign.report.run_folder.read_run` found.
        samples: held-out samples to show with films and paths.
    """
    state = RunState.of(run)
    body = [
        _header(run, state),
        "<main>",
        progress_section(run, state),
        results_section(run),
        samples_section(run, samples),
        troubles_section(run, worse_numbers(run)),
        what_section(run),
        curves_section(run),
        training_section(run),
        phases_section(run),
        _how(run),
        "</main>",
        footer(),
    ]
    refresh = REFRESH_S if state.kind == "live" else None
    return document(f"{run.name} - geoalign report", "\n".join(part for part in body if part), refresh_s=refresh)


def footer() -> str:
    """What stands below every report."""
    return f"<footer>Written by geoalign {__version__}. This file needs no network and asks nothing of it.</footer>"


def _header(run: RunRecord, state: RunState) -> str:
    summary = run.summary
    bad = sum(finding.out_of_range for finding in findings(run)) + len(worse_numbers(run))
    facts = {
        "run": run.name,
        "iterations": state.done or None,
        "seed": summary.get("seed", run.setting("run.seed")),
        "wall time": _seconds(summary.get("wall_s")),
        "CPU time": _seconds(summary.get("cpu_s")),
        "commit": str(summary.get("commit") or run.environment.get("commit") or "")[:12] or None,
    }
    chips = [
        f"<li>{label} <b>{escape(str(value))}</b></li>" for label, value in facts.items() if value not in (None, "")
    ]
    if bad:
        chips.append(
            f'<li class="bad"><a href="#troubles">{bad} {"thing" if bad == 1 else "things"} to look at</a></li>'
        )
    kinds = {"live": "running now", "stopped": "stopped early", "finished": "run report"}
    title = state.activity if state.kind == "live" else headline(run)
    return f"""<header><div class="eyebrow {state.kind}">geoalign {kinds[state.kind]}</div><h1>{title}</h1>
<p class="lead">{lead(run)}{fallback(run)}</p><ul class="chips">{"".join(chips)}</ul></header>"""


def _seconds(value: Any) -> str | None:
    return duration(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _how(run: RunRecord) -> str:
    blocks = []
    if run.config:
        text = escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110))
        blocks.append(f"<details><summary>Configuration as resolved</summary><pre>{text}</pre></details>")
    facts = run.environment | {key: run.summary[key] for key in ("versions", "commit", "seed") if key in run.summary}
    facts.pop(CHANGED, None)
    if facts:
        text = escape(yaml.safe_dump(facts, sort_keys=True, allow_unicode=True, width=110))
        blocks.append(f"<details><summary>Machine and versions</summary><pre>{text}</pre></details>")
    if not blocks:
        return ""
    same = """Every random draw follows from the seed, so the same configuration on as many processes of the same kind
of machine gives the same run."""
    return f"""<section id="how"><h2>How to make it again</h2><p>{_on_the_way(run) or same} {_processes(run)}</p>
<pre>{escape(_command(run))}</pre>{"".join(blocks)}</section>"""


def _on_the_way(run: RunRecord) -> str:
    """What changed while the run was made, as markup; empty of a run that one configuration gives."""
    listed = "".join(f"<li>{escape(change)}</li>" for change in told_changes(run))
    if not listed:
        return ""
    return f"""<b class="bad">No single configuration gives this run</b>: it was continued with
<code>--allow-config-change</code>. The configuration below is that of its last iterations, and the command makes
another run with it.</p><ul>{listed}</ul><p>"""


def _processes(run: RunRecord) -> str:
    """How many processes it was, in a sentence; of nodes also what the command leaves open."""
    started, count = run.started, run.started.count
    if count is None:
        return "How many processes it was is not recorded."
    if started.nodes == 1:
        return f"It was {count} {'process' if count == 1 else 'processes'}."
    return (
        f"It was {count} processes on {started.nodes} nodes: give each node the command with its number and the "
        "address of the first one (<code>--node-rank</code>, <code>--master-addr</code>; examples/cluster does)."
    )


def _command(run: RunRecord) -> str:
    """Train with the resolved configuration into another folder, also where ``run.dir`` does not hold the name."""
    started = run.started
    words = ["geoalign"]
    if started.torchrun:
        nodes = ["--nnodes", str(started.nodes)] if started.nodes > 1 else []
        words = ["torchrun", *nodes, "--nproc-per-node", str((started.count or 1) // started.nodes), "-m", "geoalign"]
    words += ["train", "--config", str(run.folder / "config.yaml"), f"run.name={run.name}-again"]
    folder = str(run.config.get("run", {}).get("dir") or "{name}")
    if "{name}" not in folder:
        words.append(f"run.dir={folder.rstrip('/')}-again")
    if not started.torchrun and started.count not in (None, run.setting("run.ranks") or 1):
        words.append(f"run.ranks={started.count}")
    return shlex.join(words)


def write_report(folder: str | Path, output: Path | None = None, *, samples: int = 4) -> Path:
    """Write the report of ``folder`` to ``output`` (default ``folder/report.html``) and return its path.

    Raises:
        UsageError: ``folder`` is not a run folder, or fewer than 0 samples are asked for.
        DataError: a file of the run cannot be read, or the report cannot be written.
    """
    if samples < 0:
        raise UsageError(f"--samples {samples}: 0 or more held-out samples can be shown")
    path, found = output or Path(folder) / "report.html", read_run(folder)
    check_writable(path, (".html", ".htm"))
    atomic_write_text(path, report_page(found, samples))
    return path


def follow(folders: Sequence[str | Path], write: Callable[[], object]) -> None:
    """Call ``write`` again and again until none of the runs is written any more; the last page is that of their end."""
    while any(is_live(Path(folder)) for folder in folders):
        write()
        time.sleep(REFRESH_S)
    write()
