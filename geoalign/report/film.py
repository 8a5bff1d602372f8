"""The film component: versions of one film in one place, the camera paths beside it, as HTML that works offline.

Other reports describe a film by :class:`Film`, put :func:`film_html` where it shall stand, and let
:func:`geoalign.report.document.document` make the page, which embeds the one style sheet and the one script::

    film = Film("arc left", [Take("before", "Before", frames), Take("truth", "Truth", true_frames)],
                paths=[CameraPath("target", "path asked for", c2w), CameraPath("before", "camera read", read)])
    page = document("My report", film_html(film))

The script (``film.js``) gives a slider over frames with play, takes that are switched in place, a difference view,
ground lines as cameras would see them, paths that can be turned by hand and numbers that follow the frame. Without it
(a mail reader, paper) the takes remain as film strips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from geoalign.report.media import Array, decoded, is_small, sheet, thinned

FILM_CLASS = "film"


@dataclass(frozen=True, slots=True)
class Take:
    """One version of the film, to which a viewer switches.

    Attributes:
        role: ``source``, ``before``, ``after``, ``truth`` or any other word; it chooses the colour, and the camera path
            of the same role is the one along which this take was filmed (``truth``: the path ``target``).
        label: what the viewer reads on its button.
        frames: uint8 ``[F, 3, H, W]``, or F encoded pictures (PNG, JPEG, WebP) of one size.
    """

    role: str
    label: str
    frames: Array | Sequence[bytes]


@dataclass(frozen=True, slots=True)
class CameraPath:
    """A path to be drawn: camera to world ``[F, 4, 4]``, relative to the first view, metres, OpenCV axes.

    ``role`` is ``target`` for what was asked for, else the take that was filmed along it. Poses that are not finite (a
    lost camera) are left out.
    """

    role: str
    label: str
    c2w: Array


@dataclass(frozen=True, slots=True)
class Ground:
    """The plane ``[4]`` (n, d) with ``n . X = d`` in axes of the first view, metres, and the lens of the takes.

    ``intrinsics`` ``[4]`` or ``[F, 4]`` are fx, fy, cx, cy as fractions of (W, H, W, H).
    """

    plane: Array
    intrinsics: Array


@dataclass(frozen=True, slots=True)
class FrameNumbers:
    """Values ``[F]`` of one take, one a frame; None or NaN where there is none. Equal ``title`` makes one chart."""

    title: str
    unit: str
    role: str
    values: Sequence[float | None] | Array


@dataclass(frozen=True, slots=True)
class Film:
    """Everything that one component shows.

    Attributes:
        title: heading, plain text.
        takes: at least one, all with F frames of one size.
        paths: camera paths of F poses; none: no view in space.
        ground: what the ground lines need; None: no ground lines.
        numbers: numbers by frame.
        note: a line beside the title, plain text.
        fps: frames a second when played.
        frame_labels: F labels, for films whose frames are not every frame of a video; default 1, 2, 3, ...
    """

    title: str
    takes: Sequence[Take]
    paths: Sequence[CameraPath] = ()
    ground: Ground | None = None
    numbers: Sequence[FrameNumbers] = ()
    note: str = ""
    fps: float = 4.0
    frame_labels: Sequence[str] | None = None


def film_html(film: Film) -> str:
    """The component as one ``<article>``.

    Longer films are thinned evenly to :data:`geoalign.report.media.MAX_FRAMES` frames, wider ones scaled down to
    :data:`geoalign.report.media.MAX_WIDTH` pixels. Frames up to ``SMALL`` pixels wide are kept without loss.

    Raises:
        ValueError: no takes, or parts whose numbers of frames or sizes differ.
    """
    videos = [decoded(take.frames) for take in film.takes]
    if not videos or len({video.shape for video in videos}) > 1:
        raise ValueError(f"a film needs takes of one shape, got {[video.shape for video in videos]}")
    count, _, height, width = videos[0].shape
    lengths = [len(path.c2w) for path in film.paths] + [len(row.values) for row in film.numbers]
    if film.ground is not None and np.ndim(film.ground.intrinsics) == 2:
        lengths.append(len(film.ground.intrinsics))
    if film.frame_labels is not None:
        lengths.append(len(film.frame_labels))
    if set(lengths) - {count}:
        raise ValueError(f"parts of a film of {count} frames have {lengths}")
    kept = thinned(count)
    sheets = [sheet(video[kept]) for video in videos]
    facts = _facts(film, kept) | {"width": sheets[0].width, "height": sheets[0].height, "columns": sheets[0].columns}
    facts |= {"small": is_small(width), "given": [width, height, count]}
    strips = "".join(
        f'<figure class="strip {escape(take.role)}"><figcaption>{escape(take.label)}</figcaption>'
        f'<img alt="frames of {escape(take.label)}" src="{picture.uri}"></figure>'
        for take, picture in zip(film.takes, sheets, strict=True)
    )
    note = f'<span class="note">{escape(film.note)}</span>' if film.note else ""
    pixelated = " pixelated" if facts["small"] else ""
    return (
        f'<article class="{FILM_CLASS}{pixelated}"><header><h3>{escape(film.title)}</h3>{note}</header>'
        f'<div class="film-stage"></div><div class="film-strips">{strips}</div>'
        f'<script type="application/json">{embedded_json(facts)}</script></article>'
    )


def embedded_json(value: Any) -> str:
    """JSON that can stand inside a script element; NaN and infinities become null."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _facts(film: Film, kept: Array) -> dict[str, Any]:
    labels = film.frame_labels or [str(index + 1) for index in range(int(kept[-1]) + 1)]
    ground = None
    if film.ground is not None:
        lens = np.broadcast_to(film.ground.intrinsics, (int(kept[-1]) + 1, 4))[kept]
        ground = {"plane": _rounded(film.ground.plane), "lens": _rounded(lens)}
    return {
        "takes": [{"role": take.role, "label": take.label} for take in film.takes],
        "frames": [str(labels[int(index)]) for index in kept],
        "fps": film.fps,
        "paths": [
            {"role": path.role, "label": path.label, "c2w": _rounded(np.asarray(path.c2w)[kept, :3])}
            for path in film.paths
        ],
        "ground": ground,
        "numbers": [
            {"title": row.title, "unit": row.unit, "role": row.role, "values": [row.values[int(i)] for i in kept]}
            for row in film.numbers
        ],
    }


def _rounded(values: Array) -> Any:
    """Nested lists to a tenth of a millimetre and of a milliradian."""
    return np.round(np.asarray(values, dtype=np.float64), 4).tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
