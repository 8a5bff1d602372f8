"""What lies in a camera file, told by its first bytes and not by its suffix: npz, npy or JSON."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoalign.array_files import read_arrays
from geoalign.errors import DataError
from geoalign.parsing import check_regular, parse_json, read_text


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A parsed file.

    Attributes:
        path: the file, for messages.
        data: arrays by name (npz), one array (npy), or whatever a JSON holds.
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
        DataError: missing, damaged, or neither npz, npy nor JSON.
    """
    if not path.exists():
        raise DataError(f"{path}: no such camera file")
    check_regular(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if (kind := _kind(head)) is None:
        raise DataError(f"{path}: not a camera file, which is an npz, an npy or a JSON object or list")
    return Content(path, parse_json(read_text(path), path) if kind == "JSON" else read_arrays(path, DataError))


def _kind(head: bytes) -> str | None:
    if head.startswith((b"PK", b"\x93NUMPY")):
        return "npz" if head.startswith(b"PK") else "npy"
    return "JSON" if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")) else None
