"""Tables as markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from geoalign.benchmark.statistics import Estimate
from geoalign.benchmark.table import Cell, Table, as_plain
from geoalign.files.atomic import atomic_write_text
from geoalign.report.svg import number

_CSV = ("table", "row", "column", "text", "mean", "low", "high", "cases", "clips", "p", "lost")
_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{DOWNWARDS ARROW}": r"$\downarrow$",
    "\N{UPWARDS ARROW}": r"$\uparrow$", "\N{RIGHTWARDS ARROW}": r"$\to$", "\N{DAGGER}": r"$^\dagger$",
    "\N{MINUS SIGN}": r"$-$",
}  # fmt: skip
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def cell_parts(cell: Cell) -> tuple[str, ...]:
    """A cell for people: the number or text, and what stands behind it: interval, test and pairs that were lost."""
    shown = cell.shown
    if isinstance(shown, str):
        return (shown,)
    if isinstance(shown, Estimate):
        return (number(shown.mean), *_interval(shown)) if shown.cases else ("n/a",)
    if not shown.estimate.cases:
        return ("no pair", f"{shown.lost} lost")
    mean = shown.estimate.mean
    p = "n/a" if math.isnan(shown.p) else ("< 0.0001" if shown.p < 1e-4 else f"{shown.p:.2g}")
    return ("+" if mean > 0 else "") + number(mean), *_interval(shown.estimate), f"p {p}", f"{shown.lost} lost"


def cell_text(cell: Cell) -> str:
    """The parts of a cell in one line."""
    first, *others = cell_parts(cell)
    interval = others.pop(0) if others and others[0].startswith("[") else ""
    return ", ".join([f"{first} {interval}".strip(), *others])


def _interval(value: Estimate) -> tuple[str, ...]:
    return () if math.isnan(value.low) else (f"[{number(value.low)}, {number(value.high)}]",)


def markdown(table: Table) -> str:
    """GitHub's tables."""
    lines = [f"### {table.title}", ""]
    if table.rows:
        lines += [_line(table.header), _line(["---"] * len(table.header))]
        lines += [_line([label, *map(cell_text, cells)]) for label, cells in table.rows]
        lines.append("")
    return "\n".join([*lines, *(f"{note}\n" for note in table.notes)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def latex(table: Table) -> str:
    """A ``tabular`` with its caption, for ``booktabs``."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}. {_escaped(' '.join(table.notes))}}}",
    ]
    if table.rows:
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule"]
        lines += [
            _row(table.header),
            r"\midrule",
            *(_row([label, *map(cell_text, cells)]) for label, cells in table.rows),
        ]
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: _LATEX[found[0]], text)


def as_csv(table: Table) -> str:
    """One line a cell, with everything that is known of it; what is not defined is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, lineterminator="\n")
    writer.writeheader()
    for cell in as_plain(table):
        writer.writerow({name: _written(value) for name, value in cell.items()})
    return out.getvalue()


def _written(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return value


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """``NAME.md``, ``NAME.tex`` and ``NAME.csv`` of each, and all of them in ``tables.md``."""
    written = []
    for table in tables:
        for suffix, text in ((".md", markdown(table)), (".tex", latex(table)), (".csv", as_csv(table))):
            written.append(folder / f"{table.name}{suffix}")
            atomic_write_text(written[-1], text)
    atomic_write_text(folder / "tables.md", "\n".join(map(markdown, tables)))
    return [*written, folder / "tables.md"]
