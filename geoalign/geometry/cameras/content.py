"""What lies in a camera file, told by its first bytes and not by its suffix: npz, npy, JSON or a text of numbers."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoalign.errors import DataError
from geoalign.files.arrays import read_arrays
from geoalign.files.parsing import check_regular, parse_json, read_text


@dataclass(frozen=True, slots=True, eq=False)
class NumberLines:
    """A text with the same number of numbers, separated by white space, on every line.

    Attributes:
        rows: ``[N, C]`` float64; N is at least 1.
        lines: the line number of each row, from 1; comments (``#``), a first line of words and empty lines have none.
    """

    rows: NDArray[np.float64]
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A parsed file.

    Attributes:
        path: the file, for messages.
        data: arrays by name (npz), one array (npy), whatever a JSON holds, or :class:`NumberLines`.
    """

    path: Path
    data: Any

    def has(self, *keys: str) -> bool:
        """Whether the file is an npz, or a JSON object, with all of ``keys``."""
        return isinstance(self.data, dict) and all(key in self.data for key in keys)

    def error(self, what: str) -> DataError:
        """A DataError that names the file."""
        return DataError(f"{self.path}: {what}")

    def array(self, name: str, *shapes: Sequence[int | None], value: Any = None) -> NDArray[np.float64]:
        """The entry ``name`` (or ``value``) as float64 of one of ``shapes``; None in a shape fits any length above 0.

        Raises:
            DataError: missing, not numbers, or of another shape.
        """
        if value is None and not self.has(name):
            raise self.error(f"the key {name} is missing (found {', '.join(map(str, self.data)) or 'nothing'})")
        try:
            found = np.asarray(self.data[name] if value is None else value, dtype=np.float64)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise self.error(f"{name} is not an array of numbers") from error
        if not any(_fits(found.shape, shape) for shape in shapes):
            wanted = " or ".join(str(["F" if size is None else size for size in shape]) for shape in shapes)
            raise self.error(f"{name} must be {wanted}, got {list(found.shape)}".replace("'", ""))
        return found


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(s == w or (w is None and s) for s, w in zip(shape, wanted, strict=True))


def read_content(path: Path) -> Content:
    """Read and parse a file; never unpickles.

    Raises:
        DataError: missing, damaged, or none of npz, npy, JSON and text of numbers.
    """
    if not path.exists():
        raise DataError(f"{path}: no such camera file")
    check_regular(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    kind = _kind(head)
    if kind is None:
        raise DataError(
            f"{path}: not a camera file, which is an npz, an npy, a JSON object or list, or a text of numbers"
        )
    if kind == "arrays":
        return Content(path, read_arrays(path, DataError))
    text = read_text(path)
    return Content(path, parse_json(text, path) if kind == "JSON" else _number_lines(text, path))


def _kind(head: bytes) -> str | None:
    if head.startswith((b"PK", b"\x93NUMPY")):
        return "arrays"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith((b"{", b"[")):
        return "JSON"
    return "text" if text and all(byte >= 32 or byte in b"\t\r\n" for byte in text) else None


def looks_like_numbers(path: Path) -> bool:
    """Whether a text begins like one of poses: numbers on the first or second line that is no comment."""
    try:
        check_regular(path)
        with path.open("rb") as stream:
            lines = stream.read(4096).decode("utf-8-sig", "replace").split("\n")
    except (OSError, DataError):
        return True  # the door tells why
    told = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")][:2]
    return any(len(words) > 1 and all(_is_number(word) for word in words[:8]) for words in told)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number_lines(text: str, path: Path) -> NumberLines:
    """Parse a text of numbers; only a newline ends a line. Raises DataError with the line."""
    rows: list[list[float]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            row = [float(word) for word in line.split()]
        except ValueError as error:
            if number == 1:  # RealEstate10K's address of the video
                continue
            raise DataError(f"{path}: line {number}: {error}; one pose a line is expected") from error
        if rows and len(row) != len(rows[0]):
            raise DataError(f"{path}: line {number}: {len(row)} numbers, the lines before it have {len(rows[0])}")
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(f"{path}: not a camera file: a text without numbers")
    return NumberLines(np.array(rows), tuple(lines))
