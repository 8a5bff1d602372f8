"""Small charts as inline SVG that follow the page's colours (CSS variables), so that one file works light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 12.0, 26.0
SMOOTHING = 0.8


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its name, its points and the CSS class that gives it a colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    css: str = "series-1"


def number(value: float, digits: int = 3) -> str:
    """Format for people: about ``digits`` significant digits, no exponent for everyday sizes."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    rounded = f"{abs(value):.{digits - 1}e}"  # 0.0996 with two digits is 0.10, of another size
    size = int(rounded.partition("e")[2])
    text = f"{abs(value):.{max(digits - 1 - size, 0)}f}" if -4 <= size < 5 else rounded
    return f"\N{MINUS SIGN}{text}" if value < 0 else text


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten) that lie inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with bias correction: the first value is itself, not pulled to zero."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def line_chart(
    lines: Sequence[Line], *, title: str, unit: str = "", zero: bool = False, smoothing: float = SMOOTHING
) -> str:
    """Draw curves: every value thin, its moving average bold; ``smoothing`` 0 draws the values themselves bold.

    ``zero`` keeps 0 on the vertical axis, for quantities whose size (not only whose change) matters.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True)]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = _range([y for _, y in points], zero)
    scale_x = (WIDTH - LEFT - RIGHT) / ((x_high - x_low) or 1.0)
    scale_y = (HEIGHT - TOP - BOTTOM) / (y_high - y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x_low) * scale_x, HEIGHT - BOTTOM - (y - y_low) * scale_y

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">']
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(x_low, x_high, 5):
        x, _ = place(value, y_low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8:g}" text-anchor="middle">{_tick(value)}</text>')
    for line in lines:
        raw = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        bold = [place(x, y) for x, y in zip(line.x, smooth(line.y, smoothing), strict=True)]
        parts.append(f'<path class="raw {line.css}" d="{path(raw)}"/>')
        parts.append(f'<path class="bold {line.css}" d="{path(bold)}"/>')
        end_x, end_y = bold[-1]
        parts.append(f'<circle class="dot {line.css}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/>')
        parts += _hover_points(line, raw, unit)
    return "".join(parts) + "</svg>"


def path(points: Sequence[tuple[float, float]]) -> str:
    """Compose the ``d`` attribute of a polyline."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Draw shares of a whole as one horizontal bar; parts are (label, amount), coloured by position."""
    total = sum(amount for _, amount in parts) or 1.0
    x, drawn = 0.0, []
    for index, (label, amount) in enumerate(parts):
        width = 1000.0 * amount / total
        title = f"<title>{escape(label)}: {100 * amount / total:.1f} %</title>"
        drawn.append(
            f'<rect class="fill-{index % 8 + 1}" x="{x:.2f}" y="0" width="{width:.2f}" height="26">{title}</rect>'
        )
        x += width
    return f'<svg class="stack" viewBox="0 0 1000 26" preserveAspectRatio="none" role="img">{"".join(drawn)}</svg>'


def _hover_points(line: Line, places: Sequence[tuple[float, float]], unit: str) -> list[str]:
    """Give each point an invisible spot whose title the browser shows."""
    spots = []
    for (px, py), x, y in zip(places, line.x, line.y, strict=True):
        title = escape(f"{line.label}, iteration {x:g}: {number(y, 4)} {unit}".rstrip())
        spots.append(f'<circle class="spot" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{title}</title></circle>')
    return spots


def _range(values: Sequence[float], zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    pad = 0.06 * (high - low)
    return (low if zero and low == 0 else low - pad), (high if zero and high == 0 else high + pad)


def _tick(value: float) -> str:
    text = f"{value:.6g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.0e}"
    return text.replace("-", "\N{MINUS SIGN}")
