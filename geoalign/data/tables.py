"""Reading and writing small tables of strings: csv (with or without a byte-order mark) and json lines.

Reading is strict: a row that does not fit is left out and told with its line, and takes no other row with it. Only a
newline (or carriage return and newline) ends a line.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_write_text
from geoalign.files.parsing import check_regular, parse_json, read_text

_MAX_TABLE = 256 << 20  # bytes; a row is some hundred
_MAX_HEADER = 1 << 20

_FILE_NAME = re.compile(r"[^,\s][^,]*\.[A-Za-z0-9]{2,5}")
_SEPARATORS = ";\t|"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        line: the line that it begins on, from 1.
        values: its cells that are not empty, by column.
        nested: columns of a json line that hold a list or an object, and are not among ``values``.
    """

    line: int
    values: dict[str, str]
    nested: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Table:
    """What a table holds.

    Attributes:
        columns: names of the columns (of json lines: all keys in the order in which they appear).
        rows: the rows that fit.
        misfits: (line, cause) of each row that does not.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    misfits: tuple[tuple[int, str], ...]


def read_table(path: Path) -> Table:
    """Read ``.csv`` or ``.jsonl``.

    Raises:
        DataError: missing file, wrong encoding, or a header that is none.
        UsageError: another file type.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"{path}: tables are .csv or .jsonl; convert other formats first")
    lines = [line.removesuffix("\r") for line in read_text(path, limit=_MAX_TABLE).split("\n")]
    return _csv_table(lines, path) if path.suffix == ".csv" else _jsonl_table(lines, path)


def read_columns(path: Path) -> list[str]:
    """Column names of a csv file; [] if it cannot be read."""
    try:
        check_regular(path)
        with path.open("rb") as stream:
            header = stream.readline(_MAX_HEADER).decode("utf-8-sig", "replace")
        return [name.strip() for name in _cells(header.strip("\r\n"))]
    except (OSError, DataError, csv.Error):
        return []


def _cells(record: str) -> list[str]:
    """The cells of one record; raises csv.Error where quotes are out of place."""
    rows = list(csv.reader(io.StringIO(record, newline=""), strict=True))
    if len(rows) > 1:
        raise csv.Error("a carriage return outside quotes")
    return rows[0] if rows else []


def _csv_table(lines: list[str], path: Path) -> Table:
    records = _csv_records(lines)
    _, header = next(records, (1, []))
    if isinstance(header, str):
        raise DataError(f"{path}: line 1: {header}")
    columns = [name.strip() for name in header]
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise DataError(f"{path}: the column {min(twice)} appears twice; rename one")
    if len(columns) == 1 and any(mark in columns[0] for mark in _SEPARATORS):
        raise DataError(f"{path}: its header {columns[0]!r} holds no comma; save it with commas between the columns")
    rows, misfits = [], []
    for line, cells in records:
        if isinstance(cells, str):
            misfits.append((line, cells))
        elif len(cells) != len(columns):
            misfits.append((line, f"row of another length than the header's {len(columns)} (quote texts with commas)"))
        else:
            values = {key: value.strip() for key, value in zip(columns, cells, strict=True) if key and value.strip()}
            rows.append(Row(line, values))
    return Table(tuple(columns), tuple(rows), tuple(misfits))


def _csv_records(lines: list[str]) -> Iterator[tuple[int, list[str] | str]]:
    """(line, cells or what is wrong) of each record that is not empty.

    A quoted text may go over several lines, none of which may look like a row itself: a quote that is never closed, or
    by another row's quote, costs its own line and no other.
    """
    closing = _closing_lines(lines)
    place = 0
    while place < len(lines):
        begin, end = place, closing[place]
        place += 1
        if not lines[begin].strip():
            continue
        if end is None:
            yield begin + 1, "a quote that is not closed"
            continue
        try:
            cells = _cells("\n".join(lines[begin : end + 1]))
        except csv.Error:
            yield begin + 1, "quotes out of place (write two of them inside a quoted text)"
            continue
        if any(_looks_like_row(line, len(cells)) for line in lines[begin + 1 : end + 1]):
            yield begin + 1, "a quote that is not closed"
            continue
        place = end + 1
        yield begin + 1, cells


def _closing_lines(lines: list[str]) -> list[int | None]:
    """For each line the line on which a record that begins there ends: the first that makes the quotes even."""
    result: list[int | None] = [None] * len(lines)
    following = None  # the next line with an odd number of quotes
    for index in reversed(range(len(lines))):
        odd = lines[index].count('"') % 2 == 1
        result[index] = following if odd else index
        following = index if odd else following
    return result


def _looks_like_row(line: str, columns: int) -> bool:
    try:
        cells = _cells(line)
    except csv.Error:
        return False
    return len(cells) == columns > 1 and any(_FILE_NAME.fullmatch(cell.strip()) for cell in cells)


def _jsonl_table(lines: list[str], path: Path) -> Table:
    columns: dict[str, None] = {}
    rows, misfits = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path}: line {number}")
        except DataError:
            misfits.append((number, "not JSON, or a key twice"))
            continue
        if not isinstance(row, dict):
            misfits.append((number, "not a JSON object"))
            continue
        columns |= dict.fromkeys(row)
        nested = frozenset(key for key, value in row.items() if isinstance(value, list | dict))
        values = {key: str(value).strip() for key, value in row.items() if value is not None and key not in nested}
        rows.append(Row(number, {key: value for key, value in values.items() if value}, nested))
    return Table(tuple(columns), tuple(rows), tuple(misfits))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a csv atomically; missing values become empty cells, unknown keys are errors."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, buffer.getvalue())
