"""Camera paths as SVG: a plane view with metre grid, and an axonometric view with camera frusta."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from geoalign.report.svg import path, ticks

Array = np.ndarray[Any, np.dtype[Any]]
SIZE = 300.0
MARGIN = 34.0

# OpenCV camera axes of frame 0. A view is (horizontal axis, vertical axis, sign of the vertical axis on paper).
PLANES = {
    "above": (0, 2, 1.0, "right", "forward", "From above"),
    "behind": (0, 1, -1.0, "right", "up", "Along the first view"),
}
# Axonometric directions on paper of the x (right), y (down) and z (forward) axes.
AXONOMETRIC = np.array([[0.87, 0.30], [0.0, 0.92], [0.50, -0.55]])


def choose_plane(tracks: Array) -> str:
    """Pick the plane in which the paths [..., F, 4, 4] extend more: a ground vehicle from above, a drone's map view."""
    spread = np.ptp(tracks[..., :3, 3].reshape(-1, 3), axis=0)
    return "above" if spread[2] >= spread[1] else "behind"


def plane_view(tracks: Mapping[str, Array], plane: str) -> str:
    """Draw paths {css class: c2w [F, 4, 4]} in one plane, equal scale on both axes, with a grid in metres."""
    horizontal, vertical, sign, right, up, caption = PLANES[plane]
    flat = {css: np.stack([c2w[:, horizontal, 3], sign * c2w[:, vertical, 3]], -1) for css, c2w in tracks.items()}
    everything = np.concatenate([*flat.values(), np.zeros((1, 2))])
    centre = (everything.max(0) + everything.min(0)) / 2
    half = max(float(np.ptp(everything, axis=0).max()) / 2 * 1.15, 0.05)
    scale = (SIZE / 2 - MARGIN) / half

    def place(points: Array) -> list[tuple[float, float]]:
        offset = (points - centre) * scale
        return [(SIZE / 2 + x, SIZE / 2 - y) for x, y in offset]

    parts = [_open(caption)]
    for axis in (0, 1):
        for value in ticks(float(centre[axis] - half), float(centre[axis] + half)):
            ends = np.array([[value, centre[1] - half], [value, centre[1] + half]])
            if axis == 1:
                ends = np.array([[centre[0] - half, value], [centre[0] + half, value]])
            (x1, y1), (x2, y2) = place(ends)
            css = "axis" if abs(value) < 1e-9 else "grid"
            parts.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
            label = f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
            if axis == 0:
                parts.append(f'<text class="tick" x="{x1:.1f}" y="{SIZE - 20:g}" text-anchor="middle">{label}</text>')
            else:
                parts.append(
                    f'<text class="tick" x="{MARGIN - 6:g}" y="{y1 + 3.5:.1f}" text-anchor="end">{label}</text>'
                )
    parts.append(f'<text class="tick" x="{SIZE - MARGIN:g}" y="{SIZE - 5:g}" text-anchor="end">{right} (m)</text>')
    parts.append(f'<text class="tick" x="4" y="14">{up} (m)</text>')
    for css, points in flat.items():
        parts.append(_track(css, place(points)))
    return "".join(parts) + "</svg>"


def axonometric_view(tracks: Mapping[str, Array]) -> str:
    """Draw paths {css class: c2w [F, 4, 4]} in space, with a frustum at the first, middle and last camera of each."""
    corners = np.array([[-1.0, -0.75, 1.6], [1.0, -0.75, 1.6], [1.0, 0.75, 1.6], [-1.0, 0.75, 1.6]])
    positions = np.concatenate([c2w[:, :3, 3] for c2w in tracks.values()])
    size = 0.07 * max(float(np.ptp(positions, axis=0).max()), 0.1)
    shapes: list[tuple[str, str, Array]] = []
    for css, c2w in tracks.items():
        for index in sorted({0, len(c2w) // 2, len(c2w) - 1}):
            tip = c2w[index, :3, 3]
            base = corners * size @ c2w[index, :3, :3].T + tip
            outline = np.concatenate([base, base[:1], *(np.stack([tip, corner, tip]) for corner in base)])
            shapes.append((css, "frustum", outline))
        shapes.append((css, "track", c2w[:, :3, 3]))
    flat = [(css, kind, points @ AXONOMETRIC) for css, kind, points in shapes]
    everything = np.concatenate([points for _, _, points in flat])
    centre = (everything.max(0) + everything.min(0)) / 2
    scale = (SIZE - 40.0) / max(float(np.ptp(everything, axis=0).max()), 1e-6)
    parts = [_open("In space")]
    for css, kind, points in flat:
        places = [(SIZE / 2 + x, SIZE / 2 + y) for x, y in (points - centre) * scale]
        parts.append(_track(css, places) if kind == "track" else f'<path class="frustum {css}" d="{path(places)}"/>')
    parts += _compass(scale, (everything - centre) * scale + SIZE / 2)
    return "".join(parts) + "</svg>"


def _track(css: str, places: list[tuple[float, float]]) -> str:
    marks = "".join(f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places[1:])
    return f'<path class="track {css}" d="{path(places)}"/>{marks}'


def _compass(scale: float, taken: Array) -> list[str]:
    """Draw the three axes, as long as a round number of metres, in the corner farthest from the ``taken`` places."""
    lengths = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    metres = max((length for length in lengths if length * scale <= 60), default=lengths[0])
    corners = ((30.0, SIZE - 62.0), (30.0, 46.0), (SIZE - 90.0, 46.0), (SIZE - 90.0, SIZE - 80.0))
    left, top = max(corners, key=lambda corner: float(np.linalg.norm(taken - corner - [25.0, 0.0], axis=1).min()))
    parts = []
    for direction, label in zip(AXONOMETRIC, ("right", "down", "forward"), strict=True):
        x, y = direction * metres * scale
        at_x, at_y = left + x, top + y
        parts.append(f'<line class="axis" x1="{left:g}" y1="{top:g}" x2="{at_x:.1f}" y2="{at_y:.1f}"/>')
        parts.append(f'<text class="tick" x="{at_x + 3:.1f}" y="{at_y + 4:.1f}">{label}</text>')
    parts.append(f'<text class="tick" x="{SIZE - 8:g}" y="{SIZE - 8:g}" text-anchor="end">axes: {metres:g} m</text>')
    return parts


def _open(caption: str) -> str:
    return f'<svg class="paths" viewBox="0 0 {SIZE:g} {SIZE:g}" role="img" aria-label="{escape(caption)}">'
