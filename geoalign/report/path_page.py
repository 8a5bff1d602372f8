"""The page on which a camera path is drawn by hand and saved as the project's own npz; offline, without a server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from geoalign.report.document import document
from geoalign.report.film import CameraPath, Film, Ground, Take, embedded_json, film_html
from geoalign.report.media import Array, thinned

# How a plane is assumed to lie where none is known: level, as far below the first view as a hand-held camera.
ASSUMED_PLANE = (0.0, 1.0, 0.0, 1.6)


@dataclass(frozen=True, slots=True)
class SpeedBand:
    """Peak speeds that a model was trained on: mean and bounds of their law, per second."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PathDrawing:
    """What the page starts from.

    Attributes:
        name: of the video, for headings and the saved file.
        video: uint8 ``[F, 3, H, W]``.
        size: (H, W) that the intrinsics are in pixels of when they are saved.
        intrinsics: ``[4]`` fx, fy, cx, cy as fractions of (W, H, W, H).
        plane: ``[4]`` (n, d) in axes of the first view, or None: lines are drawn on an assumed ground then.
        presets: name to path ``[F, 4, 4]``, relative to its first frame.
        fps: frames a second that turn steps into speeds.
        metres_per_s, degrees_per_s: the laws of training.
        most_path_m, most_yaw_deg: lengths and spans of heading beyond which training rejects a path.
    """

    name: str
    video: Array
    size: tuple[int, int]
    intrinsics: Array
    plane: Array | None
    presets: Mapping[str, Array]
    fps: float
    metres_per_s: SpeedBand
    degrees_per_s: SpeedBand
    most_path_m: float
    most_yaw_deg: float


def path_page(drawing: PathDrawing) -> str:
    """The whole HTML document."""
    frames = len(drawing.video)
    assumed = drawing.plane is None
    plane = np.asarray(ASSUMED_PLANE if drawing.plane is None else drawing.plane)
    film = Film(
        title=drawing.name,
        note=f"{frames} frames, {drawing.fps:g} a second",
        takes=[Take("source", "Source", drawing.video)],
        paths=[CameraPath("target", "your path", np.tile(np.eye(4), (frames, 1, 1)))],
        ground=Ground(plane, drawing.intrinsics),
        fps=drawing.fps,
    )
    facts: dict[str, Any] = {
        "name": drawing.name,
        "frames": frames,
        "kept": thinned(frames).tolist(),
        "size": list(drawing.size),
        "lens": np.asarray(drawing.intrinsics, dtype=np.float64).tolist(),
        "plane": None if drawing.plane is None else plane.tolist(),
        "presets": {name: np.round(path[:, :3], 6).tolist() for name, path in drawing.presets.items()},
        "fps": drawing.fps,
        "metres": _band(drawing.metres_per_s),
        "degrees": _band(drawing.degrees_per_s),
        "mostPath": drawing.most_path_m,
        "mostYaw": drawing.most_yaw_deg,
    }
    ground = (
        "The ground of this video is not known: its lines lie on a level plane 1.6 m below the first view."
        if assumed
        else "The lines lie on the ground that the camera file of the video tells."
    )
    return document(f"{drawing.name} - camera path", _BODY.format(
        video=escape(shlex.quote(drawing.name)), film=film_html(film), ground=ground, facts=embedded_json(facts),
        frames=frames,
    ), styles=["path.css"], scripts=["path.js"])  # fmt: skip


def _band(band: SpeedBand) -> list[float]:
    return [band.mean, band.low, band.high]


_BODY = """<header><div class="eyebrow">geoalign camera path</div><h1>Draw where the camera shall go</h1>
<p class="lead">Drag the points of the path from above and from the side, and the small handles to where the camera
looks. The film shows the ground as the drawn camera would see it, on top of what the source saw.</p></header>
<main><div class="path-tools"><label>Start from <select id="preset" aria-label="preset"></select></label>
<label>Strength
<input id="strength" type="number" min="0" max="100" step="0.25" value="1" aria-label="strength"></label>
<button type="button" id="undo">Undo</button>
<button type="button" id="save" class="primary">Save path (.npz)</button></div>
<div class="path-views"><figure><figcaption><b>From above</b> right and forward, metres</figcaption>
<canvas id="top" tabindex="0" aria-label="path from above"></canvas></figure>
<figure><figcaption><b>From the side</b> forward and up, metres</figcaption>
<canvas id="side" tabindex="0" aria-label="path from the side"></canvas></figure></div>
<div class="path-point" id="point" role="group" aria-label="selected point"></div>
<div class="path-speeds"><figure><figcaption><b>Speed</b><span id="metres-said"></span></figcaption>
<canvas id="metres"></canvas></figure>
<figure><figcaption><b>Turning</b><span id="degrees-said"></span></figcaption>
<canvas id="degrees"></canvas></figure></div>
<p id="limits" class="note"></p>
{film}<p class="note">{ground}</p>
<section><h2>Use it</h2><pre>geoalign sample --video {video} --trajectory <span id="file">path.npz</span> ...</pre>
<p class="note">The file holds {frames} camera-to-world poses in metres (OpenCV axes, the first is the first view), the
lens in pixels and the frame size: what every verb takes as a camera.</p></section></main>
<script type="application/json" id="drawing">{facts}</script>"""
