"""Held-out samples to look at: clips side by side, filmstrips, and the camera paths drawn."""

from __future__ import annotations

from html import escape

import numpy as np

from geoalign.report.media import filmstrip, looping_clip
from geoalign.report.paths import PLANES, axonometric_view, choose_plane, plane_view
from geoalign.report.run_folder import Array, EvaluationClips, RunRecord
from geoalign.report.svg import number
from geoalign.report.words import STAGES

SMALL = 160  # px; narrower clips are enlarged without smoothing so that their pixels stay visible as pixels

LEGEND = """<div class="legend"><span class="target"><i></i>path asked for</span>
<span class="before"><i></i>camera of the clip before</span>
<span class="after"><i></i>camera of the clip after</span></div>"""


def samples_section(run: RunRecord, count: int) -> str:
    """Compose the section, or nothing when the run left no clips."""
    if not run.clips:
        return ""
    last = run.clips.get("after") or run.clips["before"]
    chosen = choose_samples(last.translation_errors(), count)
    plane = choose_plane(last.target_c2w)
    parts = [_sample(run.clips, index, rank, plane) for index, rank in chosen]
    return f"""<section id="samples"><h2>See for yourself</h2>
<p>Held-out scenes and paths, which no training step saw. These are not picked by taste: samples are ordered by their
position error {"after training" if "after" in run.clips else "so far"} and taken at even ranks, from the best to the
worst.</p>{LEGEND}{"".join(parts)}</section>"""


def choose_samples(errors: Array, count: int) -> list[tuple[int, str]]:
    """Return (index, description) of ``count`` samples at even ranks of ``errors``; unreadable paths rank last."""
    order = np.argsort(np.nan_to_num(errors, nan=np.inf), kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [(int(order[rank]), _rank_text(int(rank), len(order))) for rank in ranks]


def _rank_text(rank: int, total: int) -> str:
    if rank == 0:
        return f"best of {total}"
    return f"worst of {total}" if rank == total - 1 else f"rank {rank + 1} of {total}"


def _sample(clips: dict[str, EvaluationClips], index: int, rank: str, plane: str) -> str:
    any_stage = clips.get("after") or clips["before"]
    videos = {"source": any_stage.source[index]}
    videos |= {stage: part.generated[index] for stage, part in clips.items()}
    if any_stage.truth is not None:
        videos["truth"] = any_stage.truth[index]
    tracks = {"target": any_stage.target_c2w[index]}
    tracks |= {stage: part.estimated_c2w[index] for stage, part in clips.items()}
    tracks = {css: c2w for css, c2w in tracks.items() if np.isfinite(c2w).all()}
    errors = {stage: float(part.translation_errors()[index]) for stage, part in clips.items()}
    trend = " &rarr; ".join(f'<span class="{stage}">{number(value, 2)} m</span>' for stage, value in errors.items())
    pictures = "".join(_clip(key, video) for key, video in videos.items())
    strips = "".join(_strip(key, video) for key, video in videos.items())
    small = " pixelated" if videos["source"].shape[-1] < SMALL else ""
    columns = " three" if len(videos) == 3 else ""
    return f"""<article class="sample"><header><h3>{escape(_title(any_stage.names[index]))}</h3>
<span class="note">{rank} &middot; position error {trend}</span></header>
<div class="clips{columns}{small}">{pictures}</div>
<div class="body{small}"><div class="strips">{strips}</div>
<figure><figcaption><b>{PLANES[plane][5]}</b></figcaption>{plane_view(tracks, plane)}</figure>
<figure><figcaption><b>In space</b></figcaption>{axonometric_view(tracks)}</figure></div></article>"""


def _clip(key: str, video: Array) -> str:
    title, meaning = STAGES[key]
    picture = (
        f'<img src="{looping_clip(video)}" alt="{title} clip" width="{video.shape[-1]}" height="{video.shape[-2]}">'
    )
    return f'<figure class="{key}"><figcaption><b>{title}</b><br>{meaning}</figcaption>{picture}</figure>'


def _strip(key: str, video: Array) -> str:
    title, _ = STAGES[key]
    return (
        f'<span>{title}</span><div class="strip"><img src="{filmstrip(video)}" alt="frames of the {title} clip"></div>'
    )


def _title(name: str) -> str:
    return name.replace("/", ": ").replace("_", " ")
