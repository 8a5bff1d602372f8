"""The benchmark as one HTML file that opens offline: tables, errors over time and speed, the worst cases as films."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from geoalign.benchmark.columns import Column, Row, of_method, outcome
from geoalign.benchmark.methods import TRUTH
from geoalign.benchmark.report_tables import SCRIPT, LinkedTables
from geoalign.benchmark.store import Store
from geoalign.benchmark.table import Results, all_tables
from geoalign.data.video import read_video
from geoalign.errors import DataError
from geoalign.files.atomic import atomic_write_text, check_writable
from geoalign.geometry.cameras.door import open_camera
from geoalign.report.document import document
from geoalign.report.film import CameraPath, Film, FrameNumbers, Take, film_html
from geoalign.report.page import footer
from geoalign.report.svg import Line, line_chart, number

FILMS = 12
"""Worst cases that are shown as films; all others are in the list."""
_OTHERS = (3, 5, 6, 7, 8)
"""Colours of methods that are neither the base, nor the judged one, nor the truth."""
_FIRST_TABLES = 5
"""Tables that stand above the films; slices and failures come below."""


def write_report(store: Store, output: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Write the report of a benchmark's folder to ``output`` (default ``report.html`` in it) and return its path.

    Raises:
        DataError: the folder is no benchmark, or no case is measured.
        UsageError: ``output`` is no HTML file.
    """
    path = output or store.folder / "report.html"
    check_writable(path, (".html", ".htm"))
    atomic_write_text(path, report_page(store, Results.read(store, overrides)))
    return path


def report_page(store: Store, results: Results) -> str:
    """The whole document."""
    tables = all_tables(results)
    worst = worst_cases(results)
    linked = LinkedTables(results, worst)
    first, others = (list(map(linked.html, part)) for part in (tables[:_FIRST_TABLES], tables[_FIRST_TABLES:]))
    told = "<p>Every number leads to the cases behind it, the worst first.</p>"
    body = [
        _header(store, results),
        "<main>",
        _section("results", "Results", told, *first),
        _curves(results),
        _films(store, results, worst[:FILMS]),
        _section("failures", "Where it goes wrong", *others),
        linked.behind(),
        _section("cases", "Every case", linked.case_list(FILMS)),
        "</main>",
        footer(),
    ]
    text = "\n".join(part for part in body if part)
    return document(f"{store.folder.name} - geoalign benchmark", text, scripts=[SCRIPT])


def worst_cases(results: Results) -> list[str]:
    """Names of all cases, those first that the judged method failed, then by its position error if that was read."""
    column = Column(results.readers.main, "translation_error_m")
    errors: dict[str, float] = {}
    for row in of_method(results.rows, results.judged):
        value = column.of(row)
        if value is None and not column.reader:
            value = 0.0
        errors[row["case"]] = math.inf if value is None or math.isnan(value) else value
    return sorted(errors, key=lambda case: (-errors[case], case))


def _header(store: Store, results: Results) -> str:
    cases = {row["case"] for row in results.rows}
    facts = {
        "methods": ", ".join(results.methods),
        "cases of each": len(cases),
        "clips": len({row["clip"] for row in results.rows}),
        "cameras read by": results.readers.main or "nobody",
        "settings": results.settings.settings,
    }
    read = " Readers that were told nothing of the\npaths then said where each camera went."
    read = read if results.readers.main else ""
    chips = "".join(f"<li>{label} <b>{escape(str(value))}</b></li>" for label, value in facts.items())
    return f"""<header><div class="eyebrow">geoalign benchmark</div><h1>{escape(_headline(results))}</h1>
<p class="lead">Every method retook the same clips along the same camera paths.{read}</p>
<ul class="chips">{chips}</ul></header>"""


def _headline(results: Results) -> str:
    """The position error of the judged method beside the base's."""
    column = Column(results.readers.main, "translation_error_m")
    found = {}
    for method in (results.settings.base, results.judged):
        values = [v for v in column.values(of_method(results.rows, method)).values() if math.isfinite(v)]
        found[method] = sum(values) / len(values) if values else math.nan
    named = [f"{method}: {number(value)} m from its path" for method, value in found.items()]
    return " \N{MIDDLE DOT} ".join(named) if results.readers.main else "What the methods look like"


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{"".join(parts)}</section>'


def _curves(results: Results) -> str:
    """Errors over the frames of a retake, and over the speed of its camera; one line a method."""
    reader = results.readers.main
    if not reader:
        return ""
    charts = [
        _chart(results, "Position error over time", "frame", "m", lambda m: _over_frames(results, m, "position_m")),
        _chart(results, "Rotation error over time", "frame", "\N{DEGREE SIGN}",
               lambda m: _over_frames(results, m, "rotation_deg")),
    ]  # fmt: skip
    if len({row["speed"] for row in results.rows}) > 1:
        for metric, unit in (("translation_error_m", "m"), ("rotation_error_deg", "\N{DEGREE SIGN}")):
            title = f"{'Position' if unit == 'm' else 'Rotation'} error over speed"
            charts.append(
                _chart(results, title, "speed", unit, lambda m, metric=metric: _over_speeds(results, m, metric))
            )
    legend = " ".join(
        f'<li><span class="swatch fill-{_colour(results, method)}"></span>{escape(method)}</li>'
        for method in results.methods
    )
    told = f'<p>Means over the cases that {escape(reader)} could read.</p><ul class="chips">{legend}</ul>'
    return _section("curves", "Over time and speed", told, f'<div class="charts">{"".join(charts)}</div>')


def _chart(results: Results, title: str, axis: str, unit: str, points: Any) -> str:
    lines = []
    for method in results.methods:
        x, y = points(method)
        if x:
            lines.append(Line(method, x, y, f"series-{_colour(results, method)}"))
    drawn = line_chart(lines, title=title, unit=unit, zero=True, smoothing=0.0)
    return f"<figure><figcaption><b>{title}</b><span class='now'>{unit} by {axis}</span></figcaption>{drawn}</figure>"


def _over_frames(results: Results, method: str, key: str) -> tuple[list[float], list[float]]:
    found: dict[int, list[float]] = {}
    for row in of_method(results.rows, method):
        if outcome(row, results.readers.main)[0] == "ok":
            told = row["readers"][results.readers.main]["by_frame"]
            for frame, value in zip(told.get("frames", ()), told.get(key, ()), strict=True):
                found.setdefault(frame, []).append(value)
    return [float(frame) for frame in sorted(found)], [sum(v) / len(v) for _, v in sorted(found.items())]


def _over_speeds(results: Results, method: str, metric: str) -> tuple[list[float], list[float]]:
    column, found = Column(results.readers.main, metric), dict[float, list[float]]()
    for row in of_method(results.rows, method):
        value = column.of(row)
        if value is not None and math.isfinite(value):
            found.setdefault(row["speed"], []).append(value)
    return sorted(found), [sum(v) / len(v) for _, v in sorted(found.items())]


def _films(store: Store, results: Results, cases: Sequence[str]) -> str:
    by_case: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        by_case.setdefault(row["case"], {})[row["method"]] = row
    films = [_film(store, results, case, by_case[case]) for case in cases]
    first = f"The cases of {escape(results.judged)} with the largest position error, lost cameras first."
    title = "Worst cases first"
    if not results.readers.main:
        title, first = "The first cases", f"Cases that {escape(results.judged)} failed come first."
    told = f"<p>{first} Switch between the takes in place: what jumps is what differs.</p>"
    return _section("worst", title, told, *films) if any(films) else ""


def _film(store: Store, results: Results, case: str, rows: dict[str, Row]) -> str:
    """One case by all methods that have a video of it; "" if none has."""
    anchor = f'<a id="film-{escape(case)}"></a>'
    shown = {method: rows[method] for method in results.methods if rows.get(method, {}).get("video")}
    if not shown:
        return ""
    try:
        frames = min(row["frames"] for row in shown.values())
        first = next(iter(shown.values()))
        source = _frames(store, first["source"], frames, None)
        size = (source.shape[-2], source.shape[-1])
        takes = [Take("source", "Source", source)]
        takes += [Take(_role(results, m), m, _frames(store, row["video"], frames, size)) for m, row in shown.items()]
    except DataError as error:
        return f'{anchor}<p class="note">{escape(case)}: {escape(str(error))}</p>'
    told = {m: reading for m, row in shown.items() if (reading := _whole(row, results.readers.main, frames))}
    paths = [CameraPath(_role(results, m), f"{m}, as read", _c2w(reading, frames)) for m, reading in told.items()]
    if (target := _target(store, first)) is not None:
        paths.insert(0, CameraPath("target", "path asked for", target[:frames]))
    by_frame = (("Position error", "m", "position_m"), ("Rotation error", "\N{DEGREE SIGN}", "rotation_deg"))
    numbers = [
        FrameNumbers(title, unit, _role(results, method), reading[key][:frames])
        for title, unit, key in by_frame
        for method, reading in told.items()
    ]
    return anchor + film_html(Film(case, takes, paths, None, numbers, _note(results, rows)))


def _colour(results: Results, method: str) -> int:
    """Number of the colour that the charts give a method: for base, judged method and truth that of their takes."""
    fixed = {"after": 1, "before": 2, "truth": 4}
    others = [name for name in results.methods if _role(results, name) not in fixed]
    role = _role(results, method)
    return fixed[role] if role in fixed else _OTHERS[others.index(method) % len(_OTHERS)]


def _role(results: Results, method: str) -> str:
    """What chooses a take's colour."""
    known = {results.settings.base: "before", TRUTH: "truth"}
    return known.get(method) or ("after" if method == results.judged else method)


def _note(results: Results, rows: dict[str, Row]) -> str:
    column, parts = Column(results.readers.main, "translation_error_m"), []
    for method in (name for name in results.methods if name in rows):
        value, cause = column.of(rows[method]), outcome(rows[method], column.reader)[1]
        known = value is not None and math.isfinite(value)
        parts.append(f"{method} {number(value)} m" if known else f"{method}: {cause}" if cause else method)
    return " \N{MIDDLE DOT} ".join(parts)


def _whole(row: Row, reader: str, frames: int) -> dict[str, Any] | None:
    """What a reader said of every one of the first ``frames`` frames; None where it skipped some."""
    if not reader or outcome(row, reader)[0] != "ok":
        return None
    told = row["readers"][reader]["by_frame"]
    return told if told.get("frames", [])[:frames] == list(range(frames)) else None


def _c2w(reading: dict[str, Any], frames: int) -> np.ndarray[Any, Any]:
    upper = np.asarray(reading["c2w"][:frames], dtype=np.float64)
    return np.concatenate([upper, np.tile([[[0.0, 0.0, 0.0, 1.0]]], (frames, 1, 1))], axis=1)


def _target(store: Store, row: Row) -> np.ndarray[Any, Any] | None:
    file = store.target_file(row["case"], row["frames"])
    return open_camera(file).path.c2w.numpy() if file.is_file() else None


def _frames(store: Store, name: str, frames: int, size: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    return read_video(store.folder / name, range(frames), size=size).numpy()
