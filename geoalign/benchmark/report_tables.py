"""Tables of the report, every number of which leads to the cases behind it, and the list of all cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from geoalign.benchmark.behind import Behind
from geoalign.benchmark.columns import Column, Row, outcome
from geoalign.benchmark.render import cell_parts
from geoalign.benchmark.table import Cell, Results, Table
from geoalign.report.film import embedded_json
from geoalign.report.svg import number

SCRIPT = "cases.js"
"""Shows the cases behind a number; without it the number leads to the row of the worst one."""
SHOWN = 100
"""Cases behind a number that are in the page, the worst; the file cases.jsonl has all."""
_LISTED = 2000


class LinkedTables:
    """Makes the tables of one page and remembers what stands behind their cells.

    Args:
        cases: names of all cases, in the order of :meth:`case_list`.
    """

    def __init__(self, results: Results, cases: Sequence[str]) -> None:
        self._results, self._cases = results, cases
        self._place = {case: place for place, case in enumerate(cases)}
        self._cells: list[dict[str, Any]] = []

    def html(self, table: Table) -> str:
        """A table with its title and notes."""
        head = "".join(f"<th>{escape(title)}</th>" for title in table.header)
        rows = []
        for label, cells in table.rows:
            titles = (f"{table.title}: {label}, {column}" for column in table.header[1:])
            made = "".join(self._cell(cell, title) for cell, title in zip(cells, titles, strict=True))
            rows.append(f"<tr><td>{escape(label)}</td>{made}</tr>")
        shown = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
        return f'<h3 id="{escape(table.name)}">{escape(table.title)}</h3>{shown if table.rows else ""}{notes}'

    def _cell(self, cell: Cell, title: str) -> str:
        """The number, and below it in small what stands behind it, so that wide tables stay narrow."""
        first, *others = map(escape, cell_parts(cell))
        small = "".join(f"<br><small>{part}</small>" for part in others)
        cases = [] if cell.behind is None else cell.behind.worst_first()
        if cell.behind is None or not cases:
            return f"<td>{first}{small}</td>"
        target = f"#case-{escape(cases[0][0]['case'])}"
        self._remember(title, cell.behind, cases)
        return f'<td><a href="{target}" data-behind="{len(self._cells) - 1}">{first}</a>{small}</td>'

    def _remember(self, title: str, behind: Behind, cases: Sequence[tuple[Row, float | None]]) -> None:
        shown = [[self._place[row["case"]], _shown(behind, row, value)] for row, value in cases[:SHOWN]]
        method = [*behind.rows, *(behind.base or ())][0]["method"]
        self._cells.append({"title": title, "method": method, "of": len(cases), "cases": shown})

    def behind(self) -> str:
        """The place where the script shows cases, and what it shows; after all tables."""
        videos = {
            method: {self._place[row["case"]]: row["video"] for row in self._results.rows
                     if row["method"] == method and row.get("video")}
            for method in self._results.methods
        }  # fmt: skip
        facts = {"cases": self._cases, "videos": videos, "cells": self._cells}
        return (
            '<section id="behind" hidden><h2>The cases behind a number</h2><h3></h3><p class="note"></p><ol></ol>'
            f'</section><script type="application/json" id="behind-facts">{embedded_json(facts)}</script>'
        )

    def case_list(self, filmed: int) -> str:
        """Every case with every method's video and, where cameras were read, position error; the first ``filmed`` cases
        have a film."""
        by_case: dict[str, dict[str, Row]] = {}
        for row in self._results.rows:
            by_case.setdefault(row["case"], {})[row["method"]] = row
        column = Column(self._results.readers.main, "translation_error_m")
        unit = ", m" if column.reader else ""
        head = "".join(f"<th>{escape(method)}{unit}</th>" for method in self._results.methods)
        lines = []
        for place, case in enumerate(self._cases[:_LISTED]):
            cells = "".join(_case_cell(by_case[case].get(method), column) for method in self._results.methods)
            name = f'<a href="#film-{escape(case)}">{escape(case)}</a>' if place < filmed else escape(case)
            lines.append(f'<tr id="case-{escape(case)}"><td>{name}</td>{cells}</tr>')
        left = len(self._cases) - _LISTED
        more = f'<p class="note">{left} more are in cases.jsonl.</p>' if left > 0 else ""
        body = f"<thead><tr><th>case</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        told = "The video of every case, failed ones first."
        if column.reader:
            told = "Position error by case, the worst first; each number links to the video that it was read from."
        return (
            f"<p>{told}</p><details><summary>{len(self._cases)} cases</summary>"
            f'<div class="scroll"><table>{body}</table></div>{more}</details>'
        )


def _shown(behind: Behind, row: Row, value: float | None) -> str:
    """The number of a case behind a cell, or why there is none."""
    if value is not None and math.isfinite(value):
        return f"+{number(value)}" if behind.base is not None and value > 0 else number(value)
    return outcome(row, behind.column.reader)[1] or ("no pair" if behind.base is not None else "")


def _case_cell(row: Row | None, column: Column) -> str:
    if row is None:
        return "<td>not measured yet</td>"
    value, missing = column.of(row), "n/a" if column.reader else "video"
    text = number(value) if value is not None and math.isfinite(value) else outcome(row, column.reader)[1] or missing
    linked = f'<a href="{escape(row["video"])}">{escape(text)}</a>' if row.get("video") else escape(text)
    return f"<td>{linked}</td>"
