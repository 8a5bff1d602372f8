"""Where a run stands: finished, under way or stopped; how far, how long still, and what is missing yet."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from geoalign.files.checkpoints import CHECKPOINTS, list_checkpoints
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number

_RECENT = 20  # iterations whose mean duration the estimate of the end takes
_SILENT = 10  # times that duration without a new iteration: said, for the run may hang


@dataclass(frozen=True, slots=True)
class RunState:
    """A run's progress.

    Attributes:
        kind: ``finished`` wrote its summary; ``live`` is being written; ``stopped`` is neither.
        done, total: iterations, without one that was refused; ``total`` is None where the configuration does not say.
        seconds_left: of the iterations that are left at their recent speed, without the evaluation at the end.
        silent_s: seconds since the last iteration was written.
        held_out: whether it is measured on held-out conditions; real clips have no true retake to measure against.
        missing: what a finished run has and this one lacks, in words.
    """

    kind: Literal["finished", "live", "stopped"]
    done: int
    total: int | None
    seconds_left: float | None
    silent_s: float | None
    held_out: bool
    missing: tuple[str, ...]

    @classmethod
    def of(cls, run: RunRecord) -> RunState:
        """Read it from the folder's files."""
        numbers = [int(row.get("iteration", i)) for i, row in enumerate(run.metrics)]
        done = 1 + max((n for n in numbers if run.stop is None or n < run.stop.iteration), default=-1)
        total = run.setting("train.iterations")
        total = total if isinstance(total, int) else None
        kind = "live" if run.live else "finished" if run.summary else "stopped"
        seconds = seconds_per_iteration(run)
        left = seconds * (total - done) if kind == "live" and seconds and total is not None else None
        file = run.folder / "metrics.jsonl"
        silent = time.time() - file.stat().st_mtime if kind == "live" and file.exists() else None
        missing = () if kind == "finished" else _missing(run, done, total)
        return cls(kind, done, total, left, silent, run.held_out, missing)

    @property
    def share(self) -> float:
        """Done iterations over all, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def activity(self) -> str:
        """What a live run is doing, as a headline."""
        if not self.done:
            return "Getting ready: no iteration is done yet"
        if self.total is not None and self.done >= self.total:
            doing = "measured" if self.held_out else "written"
            return f"All {self.total} iterations are done; the result is being {doing}"
        return f"Iteration {self.done} of {self.total} is done" if self.total else f"{self.done} iterations are done"


def seconds_per_iteration(run: RunRecord) -> float | None:
    """Mean duration of the recent iterations with what came between them; the first one's set-up left out."""
    rows = run.metrics[-_RECENT:]
    found = [
        row["time/iteration_s"] + (row.get("time/between_s") or 0.0) * (row is not run.metrics[0])
        for row in rows
        if isinstance(row.get("time/iteration_s"), int | float)
    ]
    return statistics.fmean(found) if found else None


def _missing(run: RunRecord, done: int, total: int | None) -> tuple[str, ...]:
    parts = []
    if run.held_out:
        parts += [
            f"the held-out evaluation {stage} training" for stage in ("before", "after") if stage not in run.clips
        ]
    if total is not None and done < total:
        parts.insert(1 if parts and "before" in parts[0] else 0, f"{total - done} of {total} iterations")
    return (*parts, "the summary")


def progress_section(run: RunRecord, state: RunState) -> str:
    """The bar of a live run and what a stopped one left undone; nothing for a finished run."""
    if state.kind == "finished":
        return ""
    facts = []
    if state.seconds_left is not None and state.share < 1:
        end = time.strftime("%H:%M", time.localtime(time.time() + state.seconds_left))
        facts.append(f"About <b>{duration(state.seconds_left)}</b> of iterations left, until {end}")
    seconds = seconds_per_iteration(run)
    if seconds:
        facts.append(f"{number(seconds)} seconds an iteration")
    if state.silent_s is not None:
        late = seconds and state.silent_s > _SILENT * seconds and state.share < 1
        warning = ' <b class="bad">which is long for this run: it may hang</b>' if late else ""
        facts.append(f"the last one was written {duration(state.silent_s)} before this page{warning}")
    listed = "".join(f"<li>{escape(part)}</li>" for part in state.missing)
    told = f"<p>{'; '.join(facts)}.</p>" if facts else ""
    after = followed([run]) if state.kind == "live" else f'{_reason(run)}<p class="note">{_continue(run)}</p>'
    return f"""<section id="progress"><h2>{"How far it is" if state.kind == "live" else "Where it stopped"}</h2>
<div class="progress" role="img" aria-label="{100 * state.share:.0f} per cent">
<i style="width:{100 * state.share:.1f}%"></i></div>{told}<h3>Missing yet</h3><ul>{listed}</ul>{after}</section>"""


def followed(runs: Sequence[RunRecord]) -> str:
    """What stands on the page of live runs, as markup: it loads itself anew, and what keeps its file up to date."""
    keep = shlex.join(["geoalign", "report", *(str(run.folder) for run in runs), "--follow"])
    return (
        f'<p class="note">Written at {time.strftime("%H:%M:%S")}. The page loads itself anew; '
        f"<code>{escape(keep)}</code> keeps its file up to date until {'the run ends' if len(runs) == 1 else 'all end'}"
        ".</p>"
    )


def _reason(run: RunRecord) -> str:
    """Why it refused to go on, as markup; nothing for a run that was stopped from outside."""
    return "" if run.stop is None else f'<p><b class="bad">It refused to go on.</b> {escape(run.stop.reason)}</p>'


def _continue(run: RunRecord) -> str:
    found = list_checkpoints(run.folder / CHECKPOINTS)
    repeats = run.stop is not None and run.stop.repeats
    if not found:
        left = "It left no checkpoint to continue from."
        return (
            f"{left} Started again as it is, it stops the same way: change what the reason names." if repeats else left
        )
    told = f"Its newest checkpoint is <code>{escape(found[-1].name)}</code>"
    if repeats:
        return (
            f"{told}. Continued as it is, the run stops the same way: change what the reason names, and continue with "
            "<code>--resume auto --allow-config-change</code>."
        )
    return f"{told}; the same command with <code>--resume auto</code> goes on."


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
