"""Reading and writing small tables of strings: csv (with or without a byte-order mark) and json lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from geoalign.errors import DataError, UsageError
from geoalign.io_utils import atomic_write_text
from geoalign.parsing import parse_json, read_text

_MAX_TABLE = 256 << 20  # bytes; a row is some hundred


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read ``.csv`` or ``.jsonl``; every value is a string, absent values are left out.

    Raises:
        DataError: missing file, wrong encoding or broken syntax; the message names file and line.
        UsageError: another file type.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"{path}: tables are .csv or .jsonl; convert other formats first")
    text = read_text(path, limit=_MAX_TABLE)
    return _csv_rows(text, path) if path.suffix == ".csv" else _jsonl_rows(text, path)


def read_columns(path: Path) -> list[str]:
    """Column names of a csv file, also of those whose cells are empty in all rows; [] if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            return [name.strip() for name in next(csv.reader(stream), [])]
    except (OSError, csv.Error):
        return []


def _csv_rows(text: str, path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [
            {
                key.strip(): value.strip()
                for key, value in row.items()
                if key and isinstance(value, str) and value.strip()
            }
            for row in reader
        ]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _jsonl_rows(text: str, path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}: line {number}")
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number}: expected an object, got {type(row).__name__}")
        rows.append({key: str(value) for key, value in row.items() if value is not None and str(value).strip()})
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a csv atomically; missing values become empty cells, unknown keys are errors."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, buffer.getvalue())
