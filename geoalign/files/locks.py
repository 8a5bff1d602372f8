"""One writer at a time: locks of run folders, caches and worlds, and private scratch folders that outlive no process.

A lock is a file under ``flock``, which the kernel drops when its process ends, however it ends. Its text names the
owner. Where a network file system keeps ``flock`` to one machine, a heartbeat (the file's time) tells from another
machine whether the owner lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from geoalign.errors import UsageError, UserError
from geoalign.files.atomic import disk_errors
from geoalign.files.parsing import read_json_object

logger = logging.getLogger(__name__)
LOCK_NAME = ".lock"
_HEARTBEAT_S, _WATCH_S = 5.0, 20.0
_WITHOUT_LOCK_S = 3600.0
"""Age at which a scratch folder that has no lock file counts as left over: its process had an hour to make one."""


@contextlib.contextmanager
def writer_lock(folder: Path, what: str, name: str = LOCK_NAME) -> Iterator[None]:
    """Be the only writer of ``folder`` (created if missing) inside the block; ``what`` says in messages what it is.

    The lock of a dead process is taken over. One that was held on another machine is watched for 20 s first.

    Raises:
        UsageError: another process holds it; the message names its host, its process and since when.
        RunError: the folder cannot be written.
    """
    path = folder / name
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    if handle is None or (_of_another_host(path) and _beats(path)):
        owner = _owner(path)
        if handle is not None:
            os.close(handle)
        raise UsageError(f"{folder}: another process writes this {what} ({owner}); wait for it, or end it")
    if path.stat().st_size:
        logger.warning("%s: the lock of a process that is gone was taken over (%s)", folder, _owner(path))
    ended = threading.Event()
    beat = threading.Thread(target=_keep_beating, args=(path, ended), name="lock", daemon=True)
    try:
        with disk_errors(path):
            told = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(told).encode(), 0)
        beat.start()
        yield
    finally:
        ended.set()
        if beat.ident is not None:
            beat.join()
        path.unlink(missing_ok=True)  # while it is held: whoever waits for this file looks again
        os.close(handle)
        with contextlib.suppress(OSError):  # a block that failed before it wrote leaves no empty folders
            for parent in created:
                parent.rmdir()


def is_locked(path: Path) -> str:
    """Who holds the lock file ``path`` on this machine, as text; empty if nobody does."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return ""
    try:
        return "" if _flock(handle) else _owner(path)
    finally:
        os.close(handle)


def held_by(path: Path) -> str:
    """Who holds the lock file ``path`` on any machine, as text; that of another machine is watched for up to 20 s."""
    if owner := is_locked(path):
        return owner
    try:
        return _owner(path) if _of_another_host(path) and _beats(path) else ""
    except FileNotFoundError:  # there is none, or its owner ended
        return ""


@contextlib.contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """A scratch folder of this process; deletes those of dead processes of the same prefix, then its own at the end."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # of another user, or being deleted
            lock = left / LOCK_NAME
            fresh = not lock.exists() and time.time() - left.stat().st_mtime < _WITHOUT_LOCK_S
            if not fresh and not is_locked(lock):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _flock(handle)
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _acquire(path: Path) -> int | None:
    """An open, locked handle of the file that has this name now; None if another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _flock(handle):
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # its owner deleted it between our two calls


def _flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without flock: the heartbeat must do
        return True
    return True


def _told(path: Path) -> dict[str, object]:
    try:
        return read_json_object(path)
    except UserError:
        return {}


def _owner(path: Path) -> str:
    told = _told(path)
    since = told.get("since")
    age = f", for {_duration(time.time() - since)}" if isinstance(since, (int, float)) else ""
    return f"host {told.get('host', 'unknown')}, process {told.get('pid', 'unknown')}{age}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _of_another_host(path: Path) -> bool:
    return _told(path).get("host", socket.gethostname()) != socket.gethostname()


def _beats(path: Path) -> bool:
    """Whether the time of the lock file moves; compares it with itself, for clocks of machines differ."""
    first, deadline = path.stat().st_mtime_ns, time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(0.5, _WATCH_S / 4))
        if path.stat().st_mtime_ns != first:
            return True
    return False


def _keep_beating(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
