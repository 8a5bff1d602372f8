"""The one drawing of the report: the loop from a request to a better model."""

from __future__ import annotations

# (x, title, subtitle, highlighted): boxes of the loop from left to right.
_BOXES = (
    (0, "Request", "source video + camera path", False),
    (216, "Model", "makes several retakes", True),
    (432, "Evaluator", "reads cameras from pixels", False),
    (648, "Compare", "metres and degrees off", False),
)


def _box(x: int, title: str, subtitle: str, hot: bool) -> str:
    css = ' class="hot"' if hot else ""
    middle = x + 90
    return (
        f'<rect{css} x="{x}" y="14" width="180" height="62" rx="10"/>'
        f'<text x="{middle}" y="41" text-anchor="middle" font-weight="600">{title}</text>'
        f'<text class="sub" x="{middle}" y="60" text-anchor="middle">{subtitle}</text>'
    )


def _arrow(x: int) -> str:
    return f'<path d="M{x + 184},45H{x + 210}" marker-end="url(#tip)"/>'


LOOP_FIGURE = (
    '<svg class="loop" viewBox="-4 0 840 136" role="img" aria-label="The training loop">'
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0L8,4L0,8z"/></marker></defs>'
    + "".join(_box(*box) for box in _BOXES)
    + "".join(_arrow(box[0]) for box in _BOXES[:-1])
    + '<path d="M738,80V112H306V82" marker-end="url(#tip)"/>'
    + '<text class="sub" x="522" y="129" text-anchor="middle">retakes closer than their siblings become more likely'
    + "</text></svg>"
)
