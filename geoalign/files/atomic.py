"""Files and folders that appear whole or not at all (a reader sees the old or the new, never half), and JSON lines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geoalign.errors import DataError, RunError, UsageError
from geoalign.files.parsing import parse_json, read_text

_MAX_ROWS = 128 << 20  # bytes of a JSON-lines file: some ten thousand iterations

_OF_ANOTHER_HOST_S = 24 * 3600.0
"""Age at which a temporary of a process on another machine, of which nothing can be asked, counts as left over."""
_looked_at: set[tuple[int, str]] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` on success, delete it on failure.

    The temporary lies in a folder of its own, for some writers have temporaries too, and ends in ``.tmp``, so that no
    pattern for data finds what a kill left; writers that choose the format by the suffix must be told. Folders of dead
    processes are deleted when this process first writes beside them. A symbolic link stays and its target is written.
    The file has the mode that the umask gives.

    Raises RunError when the place cannot be written (no rights, a file where a folder should be, a full disk).
    """
    final = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    folder = None
    with disk_errors(Path(path)):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            folder = _temporary(final.parent)
            folder.mkdir()
            temporary = folder / "new.tmp"
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            _flush(temporary)
            temporary.chmod(mode)  # safetensors puts a file of its own there, for the user alone
            temporary.replace(final)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, fix: str = "") -> Iterator[Path]:
    """Yield a new folder beside ``path`` that takes its name on success and is deleted on failure.

    A folder that had the name before is deleted after the change. Raises RunError as :func:`atomic_path` does.
    """
    temporary = None
    with disk_errors(path, fix):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(path.parent)
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # safetensors and its like write for the user alone
            for file in temporary.iterdir():
                file.chmod(mode)
                _flush(file)
            _flush(temporary)
            remove_folder(path)
            temporary.rename(path)
            _flush(path.parent)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder in a way that a kill leaves either all of it or nothing under its name."""
    if path.exists():
        doomed = _temporary(path.parent)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path, fix: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a RunError that names ``path``, the cause and what to do about it."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); {fix or fix_of(error)}") from error


def fix_of(error: OSError) -> str:
    """What a user can do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free disk space or raise the quota, then run it again"
    if error.errno == errno.ENOENT:
        return "the folder vanished: bring it back, or choose another place"
    return "choose a place that can be written, or change its rights"


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has a name that only unfinished files and folders of this module have."""
    return path.name.startswith(_MARK) and path.suffix == ".tmp"


_MARK = ".geoalign-"


def _temporary(folder: Path) -> Path:
    """A name in ``folder`` that tells host and process; deletes what dead processes left there, once per process."""
    if (os.getpid(), str(folder)) not in _looked_at:
        _looked_at.add((os.getpid(), str(folder)))
        _remove_dead(filter(is_temporary, folder.iterdir()))
    return folder / f"{_MARK}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Delete what dead processes left in ``folder`` and below it.

    For who goes on from files that are there: where nothing is written again, nobody else looks.
    """
    _remove_dead(list(folder.rglob(f"{_MARK}*.tmp")))


def _remove_dead(temporaries: Iterable[Path]) -> None:
    for left in temporaries:
        if _is_dead(left, _host()):
            shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())


def _is_dead(temporary: Path, host: str) -> bool:
    told = temporary.name.removeprefix(_MARK).split("-")
    try:
        if told[0] == host:
            os.kill(int(told[1]), 0)
            return False
        return time.time() - temporary.stat().st_mtime > _OF_ANOTHER_HOST_S
    except ProcessLookupError:
        return True
    except (OSError, IndexError, ValueError):  # runs under another user, or is gone already
        return False


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power loss must not leave half of it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 ``text`` to a file (created if missing, in a folder that must be there): all of it or, on OSError,
    none."""
    with path.open("ab", buffering=0) as file:
        before, data = file.tell(), text.encode("utf-8")
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


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
