"""Held-out samples to look at, as films with the camera paths beside them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from geoalign.report.film import CameraPath, Film, FrameNumbers, Ground, Take, film_html
from geoalign.report.run_folder import Array, EvaluationClips, RunRecord
from geoalign.report.svg import number
from geoalign.report.words import PATHS, STAGES

HOW_TO_LOOK = """<p class="note">Switch between the takes in place: what jumps is what differs. <em>Ground lines</em>
lie on the ground as a camera would see them; a retake that follows its path keeps to the lines of the path asked for.
Drag the view in space to turn it.</p>"""


def samples_section(run: RunRecord, count: int) -> str:
    """Compose the section, or nothing when the run left no clips."""
    if not run.clips or not count:
        return ""
    last = run.clips.get("after") or run.clips["before"]
    chosen = choose_samples(last.translation_errors(), count)
    first, *others = (held_out_film(run.clips, index, rank) for index, rank in chosen)
    films = film_html(first) + "".join(folded_film(film) for film in others)
    return f"""<section id="samples"><h2>See for yourself</h2>
<p>Held-out scenes and paths, which no training step saw. These are not picked by taste: samples are ordered by their
position error {"after training" if "after" in run.clips else "so far"} and taken at even ranks, from the best to the
worst.</p>{HOW_TO_LOOK}{films}</section>"""


def folded_film(film: Film) -> str:
    """A film behind a fold, whose line is its heading: a page of many films stays short."""
    note = f' <span class="note">{escape(film.note)}</span>' if film.note else ""
    return f'<details class="fold"><summary>{escape(film.title)}{note}</summary>{film_html(film)}</details>'


def choose_samples(errors: Array, count: int) -> list[tuple[int, str]]:
    """Return (index, description) of ``count`` samples at even ranks of ``errors``; unreadable paths rank last."""
    order = np.argsort(np.nan_to_num(errors, nan=np.inf), kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [(int(order[rank]), _rank_text(int(rank), len(order))) for rank in ranks]


def _rank_text(rank: int, total: int) -> str:
    if rank == 0:
        return f"best of {total}"
    return f"worst of {total}" if rank == total - 1 else f"rank {rank + 1} of {total}"


def held_out_film(clips: Mapping[str, EvaluationClips], index: int, rank: str) -> Film:
    """Sample ``index`` of the stages in ``clips`` as one film."""
    last = list(clips.values())[-1]
    takes = {"source": last.source[index]} | {stage: part.generated[index] for stage, part in clips.items()}
    if last.truth is not None:
        takes["truth"] = last.truth[index]
    paths = {"target": last.target_c2w[index]} | {stage: part.estimated_c2w[index] for stage, part in clips.items()}
    ground = None
    if last.ground_plane is not None and last.intrinsics is not None:
        ground = Ground(last.ground_plane[index], last.intrinsics[index])
    if last.source_c2w is not None:
        paths["source"] = last.source_c2w[index]
    totals = [number(float(part.translation_errors()[index]), 2) + " m" for part in clips.values()]
    by_frame = [
        ("Position error", "m", EvaluationClips.translation_errors_by_frame),
        ("Rotation error", "\N{DEGREE SIGN}", EvaluationClips.rotation_errors_by_frame),
    ]
    return Film(
        title=last.names[index].replace("/", ": ").replace("_", " "),
        note=f"{rank} \N{MIDDLE DOT} position error " + " \N{RIGHTWARDS ARROW} ".join(totals),
        takes=[Take(role, STAGES[role], frames) for role, frames in takes.items()],
        paths=[CameraPath(role, PATHS[role], c2w) for role, c2w in paths.items()],
        ground=ground,
        numbers=[
            FrameNumbers(title, unit, stage, errors(part)[index])
            for title, unit, errors in by_frame
            for stage, part in clips.items()
        ],
    )
