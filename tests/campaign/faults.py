"""A verb in a forked child of a warmed process, with a fault before its N-th file operation.

Python's audit events tell of every operation that changes the file system before it happens; safetensors, which writes
in Rust, is wrapped. So a trial costs what the verb costs, without a new interpreter.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMEOUT_S = PATIENCE_S
_ERROR = re.compile(r"geoalign( \[rank \d+\])?: error: |^failed: ")  # the second: one of several videos


@dataclass(frozen=True)
class Fault:
    """What happens before the operation ``number`` (from 1) inside the folder of the trial.

    Attributes:
        kind: "none", "kill", "full" (no new files from there on), "read-only" (no changes from there on), "terms" (two
            SIGTERM, ``delay`` seconds apart), "stop" (SIGSTOP, for a second process to try).
        number: the operation; 0 never.
        delay: see "terms".
        bytes: largest file that can be written, a full disk in the middle of a file; 0 unlimited.
    """

    kind: str = "none"
    number: int = 0
    delay: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: the signal; None: it hung and was killed), what it said, operations."""

    code: int | None
    text: str
    operations: int

    @property
    def traceback(self) -> bool:
        """Whether it spoke of an error that nobody had foreseen."""
        return "Traceback (most recent call last)" in self.text or "unexpected error: " in self.text

    @property
    def clear_error(self) -> bool:
        """Whether it failed with one line that says why."""
        told = [line for line in self.text.splitlines() if _ERROR.search(line)]
        return self.code in (1, 2) and len(told) == 1 and not self.traceback


class Child:
    """A verb running in a fork of this process."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, fault: Fault, environment: Mapping[str, str] = {}
    ) -> None:
        self._out, write = os.pipe()
        self._counted, count = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(write, 1)
            os.dup2(write, 2)
            code = 1
            try:
                code = _child(arguments, folder, fault, count, environment)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(write)
        os.close(count)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Read what it says until it ends, at most ``timeout_s``."""
        text, deadline = b"", time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._out], [], [], left)
            data = os.read(self._out, 1 << 16) if ready else b""
            if not data:
                break
            text += data
        late = deadline <= time.monotonic()
        if late:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        operations = len(os.read(self._counted, 1 << 16))
        os.close(self._out)
        os.close(self._counted)
        return Ended(None if late else os.waitstatus_to_exitcode(status), text.decode(errors="replace"), operations)


def run(arguments: Sequence[str], folder: Path, fault: Fault = Fault()) -> Ended:
    """Run ``geoalign ARGUMENTS`` in ``folder`` and wait for its end."""
    return Child(arguments, folder, fault).wait()


def state_of(pid: int) -> str:
    """The letter that Linux gives to the state of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def apart(judge: Callable[[Any], tuple[str, str]], calls: Sequence[Any]) -> list[tuple[str, str]]:
    """``judge`` of each, in a fork: a crash inside a decoder, or a loop without end, costs the one that made it."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with os.fdopen(write, "w", buffering=1) as out:
            for call in calls:
                out.write(json.dumps(judge(call)) + "\n")
        os._exit(0)
    os.close(write)
    found, rest, deadline = [], b"", time.monotonic() + TIMEOUT_S
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0] and (data := os.read(read, 1 << 16)):
        *lines, rest = (rest + data).split(b"\n")
        found += [tuple(json.loads(line)) for line in lines]
    os.close(read)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if len(found) == len(calls):
        return found
    kind = "hang" if deadline <= time.monotonic() else "traceback"
    return [*found, (kind, f"{calls[len(found)]}: ended with {code}"), *apart(judge, calls[len(found) + 1 :])]


def _child(arguments: Sequence[str], folder: Path, fault: Fault, count: int, environment: Mapping[str, str]) -> int:
    import geoalign.files.sealed
    from geoalign.cli.main import main

    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # read anew from the environment
    if fault.bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.bytes, fault.bytes))
    _inject(fault, str(folder), count, geoalign.files.sealed)
    return main(list(arguments))


def _inject(fault: Fault, folder: str, count: int, sealed: Any) -> None:
    seen, busy = [0], [False]

    def operation(path: str, makes: bool, torn: Callable[[], None] = lambda: None) -> None:
        seen[0] += 1
        os.write(count, b".")
        if fault.kind == "full" and fault.number and seen[0] >= fault.number and makes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if fault.kind == "read-only" and fault.number and seen[0] >= fault.number:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        if seen[0] != fault.number:
            return
        if fault.kind == "kill":
            torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.kind == "terms":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(fault.delay)
            os.kill(os.getpid(), signal.SIGTERM)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if busy[0] or (event != "open" and event not in CHANGES):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        path = path.decode(errors="replace") if isinstance(path, bytes) else path
        if not path or (path.startswith("/") and not path.startswith(folder)):
            return
        busy[0] = True
        try:
            operation(path, event in ("open", "os.mkdir"))
        finally:
            busy[0] = False

    save_file = sealed.save_file

    def watched(tensors: Any, path: Any, **options: Any) -> None:
        def torn() -> None:  # what a writer leaves that is killed in the middle
            save_file(tensors, path, **options)
            os.truncate(path, os.stat(path).st_size // 2)

        busy[0] = True
        try:
            operation(str(path), True, torn)
            save_file(tensors, path, **options)
        finally:
            busy[0] = False

    sealed.save_file = watched
    sys.addaudithook(hook)
