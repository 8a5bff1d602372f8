"""Files: atomic writing (a reader sees the old file or the new one, never half of one) and JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geoalign.errors import DataError, RunError, UsageError
from geoalign.parsing import parse_json, read_text

_MAX_ROWS = 128 << 20  # bytes of a JSON-lines file: some ten thousand iterations


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` on success, delete it on failure.

    The temporary name keeps the suffix of ``path`` because writers such as PyAV and numpy choose the format by it.
    Raises RunError when the place cannot be written (no rights, a file where a folder should be, a full disk).
    """
    final, temporary = Path(path), None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{final.stem}.", suffix=f".tmp{final.suffix}", dir=final.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(final)
    except OSError as error:
        raise RunError(f"{final}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Make sure, before long work, that :func:`atomic_path` will be able to write ``path``; leaves nothing behind.

    Raises UsageError for a folder and for a name that ends in none of ``suffixes`` (if any are given), DataError for a
    place where nothing can be written.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: must end in {' or '.join(suffixes)}, which says what it is")
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically, creating parent folders."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically; NaN and infinity are refused (not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def nan_to_none(value: Any) -> Any:
    """``value`` with NaN and infinity, also inside mappings and lists, replaced by None, which JSON can say."""
    if isinstance(value, Mapping):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut off by a kill is ignored.

    Raises:
        DataError: the file cannot be read, or a line other than the last is no JSON object.
    """
    rows = []
    lines = read_text(path, limit=_MAX_ROWS).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number}: must be a JSON object, not {type(row).__name__}")
        except DataError as error:
            if number == len(lines):
                break
            raise DataError(f"{error}; delete the line") from error
        rows.append(row)
    return rows
