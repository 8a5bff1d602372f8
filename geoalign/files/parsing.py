"""The boundary to files that others wrote: regular, of bounded size, and parsers' exceptions become the project's.

A damaged or hostile file ends in one error that names file and place, never in a traceback, a hang or a full memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geoalign.errors import DataError, UserError

MAX_TEXT = 32 << 20
"""Bytes of a JSON file; its parsed form may take thirty times as much."""

_MOST_DIGITS = 300
"""Of an integer: ``float`` and NumPy raise errors of their own beyond 308."""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half a character

Failure = Callable[[str], UserError]


def first_line(problem: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return next(iter(str(problem).splitlines()), "") or type(problem).__name__


def check_regular(path: Path, *, limit: int | None = None, failure: Failure = DataError) -> int:
    """The size of ``path`` in bytes; a pipe, a device, a folder and a file above ``limit`` bytes are refused.

    Raises:
        failure: as said, or the file is missing.
    """
    try:
        state = path.stat()
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise failure(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from problem
    if not stat.S_ISREG(state.st_mode):
        raise failure(f"{path}: not a regular file; give one, not a folder, pipe or device")
    if limit is not None and state.st_size > limit:
        raise failure(f"{path}: {state.st_size:,} bytes, at most {limit:,} are read here; not a file of this kind")
    return state.st_size


def read_bytes(path: str | os.PathLike[str], *, limit: int = MAX_TEXT, failure: Failure = DataError) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises:
        failure: missing, not a regular file, larger, or unreadable.
    """
    file = Path(path)
    check_regular(file, limit=limit, failure=failure)
    try:
        with file.open("rb") as stream:
            return stream.read(limit + 1)
    except OSError as problem:
        raise failure(f"{file}: cannot be read ({problem.strerror or problem})") from problem


def read_text(path: str | os.PathLike[str], *, limit: int = MAX_TEXT, failure: Failure = DataError) -> str:
    """The UTF-8 text of a file, without a byte-order mark; raises as :func:`read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, limit=limit, failure=failure).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise failure(f"{path}: not UTF-8 (byte {problem.start}); save it as UTF-8") from problem


def parse_json(text: str | bytes, where: object, failure: Failure = DataError) -> Any:
    """The value of a JSON text.

    Raises:
        failure: not JSON, nested too deeply, a key twice in an object, an integer that no float64 holds, or half a
            character in a string; ``where`` is named first.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
        if _HALF.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could be neither printed nor written
    except RecursionError:
        raise failure(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as problem:
        raise failure(f"{where}: not valid JSON ({first_line(problem)})") from problem
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands there twice, one value would go unseen."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def read_json(path: str | os.PathLike[str], failure: Failure = DataError) -> Any:
    """The value of a JSON file; raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, failure=failure), path, failure)


def read_json_object(path: str | os.PathLike[str], failure: Failure = DataError) -> dict[str, Any]:
    """The object in a JSON file; raises as :func:`read_json`, and where it holds anything else."""
    value = read_json(path, failure)
    if not isinstance(value, dict):
        raise failure(f"{path}: must hold a JSON object, not {type(value).__name__}; restore or delete the file")
    return value
