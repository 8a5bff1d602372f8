"""A process in a tool's environment: started when needed, asked one case at a time, killed with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import torch

from geoalign.benchmark.tools.settings import (
    RUNNERS,
    EnvironmentSettings,
    WorkerSettings,
    interpreter,
)
from geoalign.errors import UserError
from geoalign.files.parsing import parse_json
from geoalign.rewards.running.exchange import exchange
from geoalign.rewards.running.worker import choose_device

Kind = Literal["absent", "wrong version", "raised", "died", "timed out", "incomplete output", "identity poses"]
_AGAIN: frozenset[Kind] = frozenset({"raised", "died", "incomplete output"})
ABOUT_TIMEOUT_S = 600.0
"""Nothing but Python is started for that; a machine with much else to do may take minutes all the same."""
_LAST_BREATH_S = 120.0
"""How long a process that has closed its side may take to end: one that crashed may write gigabytes of memory first."""
_MAX_FAILED_LOADS = 4
"""After as many in a row a tool is taken for broken: loading may take minutes, and would again in every case."""
_TAIL_BYTES, _TAIL_LINES, _LINE = 1 << 16, 2, 200
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
         "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""Variables that speak of our process or of our group of processes, and would mislead one that belongs to neither."""
Found = TypeVar("Found")


class ToolFailure(UserError):
    """Why a tool has no answer for a case, in one line: ``kind: text``.

    Attributes:
        kind: what failures are counted by.
        text: the rest.
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind: Kind = kind
        self.text = text


class ToolWorker:
    """A runner script in the environment of its tool.

    Args:
        name: of the environment, for messages.
        settings: of the process.
        environment: where it runs.
    """

    def __init__(self, name: str, settings: WorkerSettings, environment: EnvironmentSettings) -> None:
        self.name, self.settings, self.environment = name, settings, environment
        self.starts = 0
        self.log = ""
        self._failed_loads: list[ToolFailure] = []
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None

    def ask(self, request: Mapping[str, Any], folder: Path, read: Callable[[Path], Found]) -> Found:
        """Have a case measured in ``folder``, which is emptied before each try, and return what ``read`` takes from it.

        Args:
            request: JSON-able; ``folder`` is added.
            read: raises ToolFailure for an output that is not whole.

        Raises ToolFailure when no try succeeds. :attr:`log` is then what the tool printed in the last.
        """
        for again in range(self.settings.retries, -1, -1):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                self.start()
                self._send({**request, "do": "measure", "folder": str(folder.absolute())}, self.settings.timeout_s)
                return read(folder)
            except ToolFailure as failure:
                if not again or failure.kind not in _AGAIN:
                    raise
        raise AssertionError("a last try returns or raises")

    def start(self) -> None:
        """Start the process unless it runs, and load the tool. Raises ToolFailure when that cannot be."""
        if self._process is not None and self._process.poll() is None:
            return
        if len(self._failed_loads) >= _MAX_FAILED_LOADS:
            last = self._failed_loads[-1]
            raise ToolFailure(last.kind, f"not tried again after {_MAX_FAILED_LOADS} starts that ended so: {last.text}")
        self._launch()
        try:
            check_about(self._send({"do": "about"}, ABOUT_TIMEOUT_S), self.name, self.environment)
            self._load()
        except ToolFailure:  # what cannot be loaded leaves no process behind
            self.close()
            raise
        self._failed_loads.clear()

    def close(self) -> None:
        """Kill the process, with all that it started, if it runs."""
        self._end()
        self._process = None

    def _load(self) -> None:
        try:
            self._send({"do": "load"}, self.settings.start_timeout_s)
        except ToolFailure as failure:
            self._failed_loads.append(failure)
            raise

    def _launch(self) -> None:
        self.close()
        python = interpreter(self.name, self.environment)
        if not python.exists():
            raise ToolFailure("absent", f"no {python}; `geoalign doctor` tells the commands that make it")
        setup = {
            "runner": str(self.settings.runner),
            "options": self.settings.options,
            "distribution": self.environment.distribution,
            "files": list(self.environment.files),
        }
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by _finish
        try:
            self._process = subprocess.Popen(
                [str(python), str(RUNNERS / "host.py"), json.dumps(setup)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
                env={**child_environment(os.environ, python), **self.settings.variables},
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise ToolFailure("absent", f"{python} cannot be started ({error.strerror or error})") from error
        self._end = weakref.finalize(self, _finish, self._process, self._errors)
        self.starts += 1

    def _send(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        process, errors = self._process, self._errors
        assert process is not None and errors is not None
        os.ftruncate(errors.fileno(), 0)  # an offset is shared with the process: it goes on writing from the beginning
        os.lseek(errors.fileno(), 0, os.SEEK_SET)
        line = exchange(process, json.dumps(request), timeout_s, lambda: kill_group(process))
        told = parse_json(line, f"answer of {self.name}") if line else None
        code = None if told is not None else _exit_code(process)
        self.log = _printed(errors)
        if told is not None and "error" not in told:
            return told
        tail = last_lines(self.log)
        if told is not None:
            self.log += f"\n{told['traceback']}"
            raise ToolFailure("raised", _joined(told["error"], tail))
        self.close()
        if line is None:
            raise ToolFailure("timed out", _joined(f"no answer within {timeout_s:g} s, killed", tail))
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        raise ToolFailure("died", _joined(f"ended {how}", tail))


def check_about(told: Mapping[str, Any], name: str, environment: EnvironmentSettings) -> None:
    """Compare what an environment says of itself with what a tool needs; raises ToolFailure where they differ."""
    version, wanted = told["version"], f"{environment.distribution} {' or '.join(environment.versions)}"
    if version is None:
        raise ToolFailure("absent", f"the environment {name} has no {wanted}")
    if not environment.accepts(version):
        raise ToolFailure(
            "wrong version", f"{environment.distribution} {version} in the environment {name}, not {wanted}"
        )
    if told["missing"]:
        raise ToolFailure("wrong version", f"{environment.distribution} {version} lacks {', '.join(told['missing'])}")


def child_environment(ours: Mapping[str, str], python: Path) -> dict[str, str]:
    """Variables for a process of another environment: its own programs first, one device, nothing about our process."""
    kept = {name: value for name, value in ours.items() if name not in _OURS and not name.startswith("TORCHELASTIC_")}
    kept["PATH"] = os.pathsep.join(filter(None, (str(python.absolute().parent), ours.get("PATH"))))
    stated = ours.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(torch.cuda.device_count())] if stated is None else stated.split(",")
    if names != [""] and (device := choose_device(ours, len(names))) is not None:
        kept["CUDA_VISIBLE_DEVICES"] = names[device]
    return kept


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads its own group, and all that are left in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_lines(text: str) -> str:
    """The last lines of what a program printed, of bounded length; a progress bar counts as its last state."""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return " / ".join(line[-_LINE:] for line in list(filter(None, lines))[-_TAIL_LINES:])


def _joined(text: str, tail: str) -> str:
    text = " ".join(text.split())[: 2 * _LINE]
    return f"{text}; it printed: {tail}" if tail else text


def _exit_code(process: subprocess.Popen[str]) -> int | None:
    """Of a process that closed its side of the conversation; None if it lives on all the same."""
    try:
        return process.wait(_LAST_BREATH_S)
    except subprocess.TimeoutExpired:
        return None


def _printed(errors: IO[bytes]) -> str:
    end = os.fstat(errors.fileno()).st_size
    start = max(0, end - _TAIL_BYTES)
    return os.pread(errors.fileno(), end - start, start).decode("utf-8", "replace")


def _finish(process: subprocess.Popen[str], errors: IO[bytes]) -> None:
    kill_group(process)
    process.wait()
    for pipe in (process.stdin, process.stdout, errors):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
