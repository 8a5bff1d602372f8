"""Held-out samples to look at, as films with the camera paths beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from geoalign.report.film import CameraPath, Film, FrameNumbers, Ground, Take, film_html
from geoalign.report.run_folder import Array, EvaluationClips, RunRecord, TrainingClip
from geoalign.report.svg import number
from geoalign.report.words import PATHS, STAGES

_GROUND = """ <em>Ground lines</em> lie on the ground as a camera would see them; a retake that follows its path keeps
to the lines of the path asked for."""


def samples_section(run: RunRecord, count: int) -> str:
    """Compose the section, or nothing when the run left no clips."""
    if not run.clips or not count:
        return ""
    last = run.clips.get("after") or run.clips["before"]
    look = how_to_look(last)
    chosen = choose_samples(last.translation_errors(), count)
    first, *others = (held_out_film(run.clips, index, rank) for index, rank in chosen)
    films = film_html(first) + "".join(folded_film(film) for film in others)
    return f"""<section id="samples"><h2>See for yourself</h2>
<p>Held-out scenes and paths, which no training step saw. These are not picked by taste: samples are ordered by their
position error {"after training" if "after" in run.clips else "so far"} and taken at even ranks, from the best to the
worst.</p>{look}{films}</section>"""


def how_to_look(clips: EvaluationClips) -> str:
    """What a reader can do with the films of these clips."""
    lines = "" if clips.ground_plane is None or clips.intrinsics is None else _GROUND
    return f"""<p class="note">Switch between the takes in place: what jumps is what differs.{lines} Drag the view in
space to turn it.</p>"""


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
    stages = [(stage, STAGES[stage], part) for stage, part in clips.items()]
    return _film(stages, index, rank, {stage: PATHS[stage] for stage in clips})


def compared_film(
    runs: Sequence[tuple[str, str, EvaluationClips]], base: EvaluationClips | None, index: int, rank: str
) -> Film:
    """Sample ``index`` of several runs (role, name, clips after training) as one film, with that of their base."""
    stages = [*([("base", "Base", base)] if base else []), *runs]
    return _film(stages, index, rank, {role: f"camera read of {name}" for role, name, _ in stages})


def training_section(run: RunRecord) -> str:
    """Films of training samples, in order, each behind its fold; nothing when the run made none."""
    if not run.films:
        return ""
    films = "".join(folded_film(_training_film([("after", "Retake", clip)], "camera read")) for clip in run.films)
    look = ["the camera read keeps to the path asked for"] * any(clip.read_c2w is not None for clip in run.films)
    look += ["the ground keeps to the lines of the path asked for"] * any(
        clip.ground_plane is not None for clip in run.films
    )
    advice = f", so look at whether {' and '.join(look)}" if look else ""
    return f"""<section id="training"><h2>While it trained</h2>
<p>One training sample of an iteration each: the first one, picked by nobody. Requests change from one iteration to the
next{advice}.</p>{films}</section>"""


def compared_training_section(runs: Sequence[tuple[str, str, Sequence[TrainingClip]]]) -> str:
    """Training samples of several runs (role, name, films): those of one request in one film, else the newest of each.

    Nothing unless every run made films.
    """
    if not all(films for _, _, films in runs):
        return ""
    by_iteration = [{film.iteration: film for film in films} for _, _, films in runs]
    same = [
        [(role, name, films[i]) for (role, name, _), films in zip(runs, by_iteration, strict=True)]
        for i in by_iteration[0]
        if all(i in films and _same_request(films[i], by_iteration[0][i]) for films in by_iteration)
    ]
    if same:
        films = [_training_film(takes, "camera read of {}") for takes in same]
        told = "The first sample of iterations in which every run had the same request: source, path and lens"
    else:
        films = [_training_film([("after", "Retake", films[-1])], "camera read", name) for _, name, films in runs]
        told = "The newest film of each run: they share no request, so they cannot be laid over one another"
    return f"""<section id="training"><h2>While they trained</h2><p>{told}. They are samples that the runs learnt from;
only held-out conditions tell a gain.</p>{"".join(map(folded_film, films))}</section>"""


def _same_request(clip: TrainingClip, other: TrainingClip) -> bool:
    pairs = ((part.source, part.frames, part.target_c2w, part.intrinsics) for part in (clip, other))
    return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


def _training_film(takes: Sequence[tuple[str, str, TrainingClip]], camera: str, whose: str = "") -> Film:
    """Retakes (role, label, film) of one request in one film.

    ``camera`` names a path that was read, with ``{}`` for the label; ``whose`` is the run in the title.
    """
    clip = takes[0][2]
    read = [(role, label, part.read_c2w) for role, label, part in takes if part.read_c2w is not None]
    lost = [label for _, label, c2w in read if not np.isfinite(c2w).any()]
    note = "" if not lost else "no camera was read" + (f" of {', '.join(lost)}" if len(takes) > 1 else "")
    return Film(
        title=f"{whose}, iteration {clip.iteration}" if whose else f"Iteration {clip.iteration}",
        note=note,
        takes=[
            Take("source", STAGES["source"], clip.source),
            *(Take(role, label, part.retake) for role, label, part in takes),
        ],
        paths=[
            CameraPath("target", PATHS["target"], clip.target_c2w),
            *(CameraPath(role, camera.format(label), c2w) for role, label, c2w in read),
        ],
        ground=None if clip.ground_plane is None else Ground(clip.ground_plane, clip.intrinsics),
        frame_labels=[str(frame) for frame in clip.frames],
    )


def _film(stages: Sequence[tuple[str, str, EvaluationClips]], index: int, rank: str, paths: Mapping[str, str]) -> Film:
    """Source, the stages (role, label, clips) and the truth in one film; ``paths`` names the stages' cameras."""
    last = stages[-1][2]
    takes = [Take("source", STAGES["source"], last.source[index])]
    takes += [Take(role, label, part.generated[index]) for role, label, part in stages]
    if last.truth is not None:
        takes.append(Take("truth", STAGES["truth"], last.truth[index]))
    drawn = [CameraPath("target", PATHS["target"], last.target_c2w[index])]
    drawn += [CameraPath(role, paths[role], part.estimated_c2w[index]) for role, _, part in stages]
    if last.source_c2w is not None:
        drawn.append(CameraPath("source", PATHS["source"], last.source_c2w[index]))
    ground = None
    if last.ground_plane is not None and last.intrinsics is not None:
        ground = Ground(last.ground_plane[index], last.intrinsics[index])
    told = {"before": "before", "after": "after", "base": "base"}  # a run keeps its name as it is
    errors = [
        f"{told.get(role, label)} {number(float(part.translation_errors()[index]), 2)} m"
        for role, label, part in stages
    ]
    by_frame = [
        ("Position error", "m", EvaluationClips.translation_errors_by_frame),
        ("Rotation error", "\N{DEGREE SIGN}", EvaluationClips.rotation_errors_by_frame),
    ]
    return Film(
        title=last.names[index].replace("/", ": ").replace("_", " "),
        note=f"{rank} \N{MIDDLE DOT} position error {', '.join(errors)}",
        takes=takes,
        paths=drawn,
        ground=ground,
        numbers=[
            FrameNumbers(title, unit, role, error(part)[index])
            for title, unit, error in by_frame
            for role, _, part in stages
        ],
    )
