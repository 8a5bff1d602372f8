"""The tables of a benchmark, made from its rows and nothing else: 1 to 3 in the paper's order, and what they hide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoalign.benchmark.behind import Behind
from geoalign.benchmark.bins import SLICES, Slice
from geoalign.benchmark.columns import CAMERA, OPEN, TITLES, Column, Readers, Row, of_method, outcome
from geoalign.benchmark.forms import NumbersForm
from geoalign.benchmark.methods import TRUTH
from geoalign.benchmark.statistics import Difference, Estimate, difference, estimate
from geoalign.benchmark.store import NUMBERS, Store
from geoalign.config.benchmark import BenchmarkConfig
from geoalign.config.source import did_you_mean
from geoalign.errors import DataError
from geoalign.files.forms import filled
from geoalign.files.parsing import read_json_object

PRINTED = "as printed by its authors"
_CAUSES = 3
"""Causes of failure that are named, the commonest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One cell: what it shows, and the cases behind it, None where no number is."""

    shown: str | Estimate | Difference
    behind: Behind | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        name: of its files.
        title: above it.
        header: titles of the columns; the first is that of the row labels.
        rows: label and cells, as long as the header.
        notes: sentences below it.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """The rows of a benchmark with what is needed to read them.

    Attributes:
        settings: of the benchmark section.
        rows: by method, then case.
        methods: names in the order of the command line, the base first.
        readers: who measured.
        expected: how many cases each method has.
        printed: numbers of other methods by name and metric, as printed by their authors.
        printed_source: where those were printed.
    """

    settings: BenchmarkConfig
    rows: Sequence[Row]
    methods: tuple[str, ...]
    readers: Readers
    expected: int
    printed: Mapping[str, Mapping[str, float]]
    printed_source: str = ""

    @staticmethod
    def read(store: Store, overrides: Iterable[str] = ()) -> Results:
        """Read a benchmark's folder; raises DataError for one without any row."""
        manifest, settings, rows = store.manifest(), store.config(overrides).benchmark, store.rows()
        if not rows:
            raise DataError(f"{store.folder}: no case is measured yet; run `geoalign benchmark run`")
        names = sorted(manifest["methods"], key=lambda name: (name == TRUTH, name != settings.base))
        printed, source = read_numbers(store.folder / NUMBERS) if (store.folder / NUMBERS).is_file() else ({}, "")
        readers = Readers.of(manifest["readers"], settings)
        return Results(settings, rows, tuple(names), readers, len(manifest["cases"]), printed, source)

    @property
    def judged(self) -> str:
        """The method whose worst clips are named: the last one that is not the truth."""
        return next((name for name in reversed(self.methods) if name != TRUTH), TRUTH)

    @property
    def truth(self) -> bool:
        """Whether the true retakes are known."""
        return any("psnr_db" in row.get("metrics", {}) for row in self.rows)

    def open(self) -> int:
        """How many cases of all methods lack their row, or a reader."""
        done = sum(all(outcome(row, reader)[0] != OPEN for reader in self.readers.told) for row in self.rows)
        return self.expected * len(self.methods) - done


def read_numbers(path: Path) -> tuple[dict[str, dict[str, float]], str]:
    """Numbers that a user copied from a paper: ``{"source": TEXT, "methods": {NAME: {METRIC: NUMBER}}}``.

    Raises DataError for a file of another form, or a metric that no table prints.
    """
    fix = 'expected {"source": TEXT, "methods": {NAME: {METRIC: NUMBER}}}'
    found = filled(NumbersForm, read_json_object(path), path, fix)
    for name, numbers in found.methods.items():
        if unknown := next((metric for metric in numbers if metric not in TITLES), None):
            raise DataError(
                f"{path}: {name}: no table prints {unknown!r}{did_you_mean(unknown, tuple(TITLES))}; there are "
                f"{', '.join(TITLES)}"
            )
    return found.methods, found.source


def all_tables(results: Results) -> list[Table]:
    """Every table, in the order in which they are printed."""
    main = results.readers.columns(truth=results.truth)
    tables = [
        _means(results, "table1", "Table 1: consistency, camera accuracy and quality", results.methods, main),
        _differences(results, "table1_differences", "Table 1: differences from the base", results.methods, main),
        _by_reader(results),
        _by_speed(results, main),
        _ablation(results, main),
    ]
    return [*tables, *_slices(results), _failures(results)]


def _means(results: Results, name: str, title: str, methods: Sequence[str], columns: Sequence[Column]) -> Table:
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for method in methods:
        own = of_method(results.rows, method)
        rows.append((method, (*_estimates(results, columns, own), _lost(results, own))))
    for method, numbers in results.printed.items():
        printed = [Cell(f"{numbers[c.metric]:g}\N{DAGGER}" if c.metric in numbers else "") for c in columns]
        rows.append((method, (*printed, Cell(""))))
    notes = [_intervals(results), _cameras(results)]
    if missing := results.readers.not_measured():
        notes.append(f"Not measured here: {', '.join(missing)}.")
    if results.printed:
        where = f" ({results.printed_source})" if results.printed_source else ""
        notes.append(f"\N{DAGGER} {PRINTED}{where}, not measured here.")
    if left := results.open():
        notes.append(f"Unfinished: {left} of {results.expected * len(results.methods)} cases are not measured yet.")
    header = ("method", *(column.title for column in columns), "failed cases")
    return Table(name, title, header, tuple(rows), tuple(notes))


def _estimates(results: Results, columns: Iterable[Column], own: Sequence[Row]) -> list[Cell]:
    """Mean and interval of each column over rows of one method."""
    return [Cell(estimate(c.values(own), results.settings.resamples), Behind(c, own)) for c in columns]


def _lost(results: Results, rows: Sequence[Row]) -> Cell:
    """How many cases of a method lack the camera of the main reader, or without one the video, of how many."""
    reader = results.readers.main
    lost = _of_status(rows, reader, "failed")
    return _counted(f"{len(lost)} of {len(rows)}", reader, lost)


def _counted(text: str, reader: str, rows: Sequence[Row]) -> Cell:
    """A count of cases, ordered by their position errors where ``reader`` reads cameras."""
    return Cell(text, Behind(Column(reader, "translation_error_m"), rows, counted=True) if rows else None)


def _differences(results: Results, name: str, title: str, methods: Sequence[str], columns: Sequence[Column]) -> Table:
    base = of_method(results.rows, results.settings.base)
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for method in methods:
        if method in (results.settings.base, TRUTH) or not base:
            continue
        own = of_method(results.rows, method)
        found = (difference(c.values(own), c.values(base), results.settings.resamples) for c in columns)
        cells = tuple(Cell(value, Behind(c, own, base)) for c, value in zip(columns, found, strict=True))
        rows.append((method, cells))
    notes = (
        f"Method minus {results.settings.base} on the cases that both have; p: Wilcoxon signed-rank test over the "
        "clips' mean differences, two-sided, not corrected for the number of columns; lost: cases that one of both, or "
        "both, failed.",
    )
    if not base:
        notes = (f"Not available: no method is called {results.settings.base} (benchmark.base).",)
    return Table(name, title, ("method", *(column.title for column in columns)), tuple(rows), notes)


def _by_reader(results: Results) -> Table:
    rows = []
    for reader in results.readers.cameras:
        for method in results.methods:
            own = of_method(results.rows, method)
            cells = _estimates(results, (Column(reader, metric) for metric in CAMERA), own)
            failed, elsewhere = (_of_status(own, reader, status) for status in ("failed", "not applicable"))
            told = f"{len(failed)} of {len(own)}" + (f", {len(elsewhere)} not applicable" if elsewhere else "")
            rows.append(
                (f"{results.readers.label(reader)}: {method}", (*cells, _counted(told, reader, failed + elsewhere)))
            )
    header = ("reader: method", *(Column("", metric).title for metric in CAMERA), "failed cases")
    notes = (
        "Position, rotation, scale ratio and gain compare both paths from frame 0 and align nothing else. TransErr fits"
        " a scale first, and is 0 for paths that turn in place.",
    )
    if TRUTH in results.methods:
        notes += (f"{TRUTH}: the true retakes; what a reader says of them is its own error.",)
    return Table("readers", "Camera accuracy by every reader", header, tuple(rows), notes)


def _of_status(rows: Iterable[Row], reader: str, status: str) -> list[Row]:
    return [row for row in rows if outcome(row, reader)[0] == status]


def _by_speed(results: Results, columns: Sequence[Column]) -> Table:
    clips, told = _read_clips(results)
    rows = []
    for speed in sorted({row["speed"] for row in results.rows}):
        for method in results.methods:
            own = [r for r in of_method(results.rows, method) if r["speed"] == speed and r["clip"] in clips]
            if own:
                cells = (*_estimates(results, columns, own), _lost(results, own))
                rows.append((f"{speed:g} x: {method}", cells))
    header = ("speed: method", *(column.title for column in columns), "failed cases")
    return Table("table2", "Table 2: over camera speeds", header, tuple(rows), (told, _intervals(results)))


def _read_clips(results: Results) -> tuple[set[str], str]:
    """The clips of table 2, and how they were chosen."""
    every = {row["clip"] for row in results.rows}
    reader, base = results.readers.main, results.settings.base
    if not results.settings.table2_reads_base or not reader or base not in results.methods:
        return every, f"Over all {len(every)} clips."
    lost = {r["clip"] for r in of_method(results.rows, base) if outcome(r, reader)[0] == "failed"}
    kept = every - lost
    told = f"Over {len(kept)} of {len(every)} clips: those of which {reader} read every retake of {base}"
    return kept, told + (f"; left out: {', '.join(sorted(lost))}." if lost else ".")


def _ablation(results: Results, columns: Sequence[Column]) -> Table:
    title, wanted = "Table 3: ablation of the geometry reward", results.settings.ablation
    if missing := [name for name in wanted if name not in results.methods]:
        note = (
            f"Not available: no method is called {' or '.join(missing)}. Give --model {wanted[0]}=RUN (aesthetic "
            f"reward only) and --model {wanted[1]}=RUN (full reward), or name them in benchmark.ablation."
        )
        return Table("table3", title, ("method",), (), (note,))
    asked = dict.fromkeys((results.settings.base, *wanted))
    methods = [name for name in asked if name in results.methods]
    made = _means(results, "table3", title, methods, columns)
    ours = made.rows[: len(methods)]
    return Table("table3", title, made.header, ours, made.notes[:2])


def _slices(results: Results) -> list[Table]:
    """A.1 as numbers: where a method goes wrong, with its worst clips."""
    reader = results.readers.main
    column = Column(reader, "translation_error_m")
    return [_slice(results, item, column) for item in SLICES] if reader else []


def _slice(results: Results, item: Slice, column: Column) -> Table:
    title, name = f"Failures by {item.title} (position error in metres, {column.reader})", f"slice_{item.name}"
    bins = item.bins(results.rows)
    header = (
        "slice",
        "cases",
        *(f"{m}: {part}" for m in results.methods for part in ("error", "failed")),
        "worst clips",
    )
    rows = []
    for label, inside in bins:
        judged = Behind(column, of_method(inside, results.judged), counted=True)
        cells = [Cell(str(len({row["case"] for row in inside})), judged)]
        for method in results.methods:
            own = of_method(inside, method)
            cells += [*_estimates(results, [column], own), _lost(results, own)]
        rows.append((label, (*cells, Cell(_worst(judged.rows, column), judged))))
    notes = [] if bins else [f"Not available: {item.source}."]
    if bins:
        notes.append(f"Worst clips: of {results.judged}, by their mean error; failed cases have none.")
    return Table(name, title, header, tuple(rows), tuple(notes))


def _worst(rows: Sequence[Row], column: Column, count: int = 3) -> str:
    by_clip: dict[str, list[float]] = {}
    for row in rows:
        if (value := column.of(row)) is not None and math.isfinite(value):
            by_clip.setdefault(row["clip"], []).append(value)
    means = sorted(((sum(v) / len(v), clip) for clip, v in by_clip.items()), reverse=True)
    return ", ".join(f"{clip} ({mean:.3g})" for mean, clip in means[:count])


def _failures(results: Results) -> Table:
    rows = []
    for reader in results.readers.told:
        for method in results.methods:
            own = of_method(results.rows, method)
            by_status = {s: _of_status(own, reader, s) for s in ("ok", "failed", "not applicable")}
            counts = [_counted(str(len(found)), reader, found) for found in by_status.values()]
            causes = Counter(outcome(row, reader)[1] for row in by_status["failed"]).most_common(_CAUSES)
            named = "; ".join(f"{count} x {cause}" for cause, count in causes)
            cells = (*counts, _counted(named, reader, by_status["failed"]))
            rows.append((f"{results.readers.label(reader)}: {method}", cells))
    header = ("reader: method", "ok", "failed", "not applicable", "commonest causes")
    return Table("failures", "What failed, and why", header, tuple(rows))


def _intervals(results: Results) -> str:
    return (
        f"Mean over cases; in brackets its 95 % interval over clips ({results.settings.resamples} bootstrap resamples)."
    )


def _cameras(results: Results) -> str:
    if not results.readers.main:
        return "No reader of cameras is configured."
    return (
        f"Cameras are read by {results.readers.label(results.readers.main)}. TransErr fits a scale first and is 0 for "
        "paths that turn in place: a wrong scale shows in metres and in the scale ratio only."
    )


def as_plain(table: Table) -> list[dict[str, Any]]:
    """The cells of a table one by one, with everything that is known of each."""
    found = []
    for label, cells in table.rows:
        for title, cell in zip(table.header[1:], cells, strict=True):
            found.append({"table": table.name, "row": label, "column": title, **_plain(cell.shown)})
    return found


def _plain(shown: str | Estimate | Difference) -> dict[str, Any]:
    if isinstance(shown, str):
        return {"text": shown}
    value = shown.estimate if isinstance(shown, Difference) else shown
    told = {"mean": value.mean, "low": value.low, "high": value.high, "cases": value.cases, "clips": value.clips}
    return told | ({"p": shown.p, "lost": shown.lost} if isinstance(shown, Difference) else {})
