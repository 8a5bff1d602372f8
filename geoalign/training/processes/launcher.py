"""Starts the ranks of a run on this machine and ends as one process would: one message, one exit code, no orphan.

The starting process imports no PyTorch: it passes signals on, waits, and says why the run ended. A rank knows it by
``FOLDER`` in its environment: there the ranks find each other and leave their last words. Its standard input is a pipe
whose other end the starting process holds, so a rank learns of its death whatever caused it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoalign.errors import Stopped, UsageError, UserError
from geoalign.files.locks import private_folder

FOLDER = "GEOALIGN_RANKS_FOLDER"
"""Environment variable of a rank: the folder that it shares with the others."""
GRACE_S = 15.0
"""How long the other ranks may take to notice that one failed; then they are killed."""
INTERRUPTED = 130
_WORDS = "last_words.jsonl"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the run ended: what to say (empty: nothing), the exit code, and the signal to die of, if any."""

    text: str
    exit_code: int
    signal: int | None = None


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse variables of a launcher that make no sense: a rank that is none of the ranks would do another's work.

    Raises:
        UsageError: one is no number, or ``RANK`` is not among ``WORLD_SIZE``.
    """
    for ours, of, alone in (("RANK", "WORLD_SIZE", 1), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", math.inf)):
        told = {name: environment[name] for name in (ours, of) if name in environment}
        numbers = {name: int(value) if re.fullmatch(r"[0-9]{1,9}", value) else -1 for name, value in told.items()}
        lacks_rank = numbers.get("WORLD_SIZE", 1) > 1 and ours not in numbers
        if lacks_rank or not 0 <= numbers.get(ours, 0) < numbers.get(of, alone):
            named = ", ".join(f"{name}={value!r}" for name, value in told.items()) + f", no {ours}" * lacks_rank
            raise UsageError(f"{named} in the environment: no rank of a run; use torchrun, or unset these variables")


def started_by_launcher() -> bool:
    """Whether this process is a rank that :func:`run_ranks` started."""
    return FOLDER in os.environ


def meeting_place() -> str:
    """Where the ranks meet, as ``init_method`` of a process group: a file of :func:`run_ranks`, or torchrun's store."""
    return f"file://{os.environ[FOLDER]}/store" if started_by_launcher() else "env://"


def leave_words(text: str, exit_code: int) -> None:
    """In a rank: why it ends, for the starting process to say."""
    line = json.dumps({"rank": int(os.environ["RANK"]), "text": text, "exit_code": exit_code}) + "\n"
    file = os.open(Path(os.environ[FOLDER]) / _WORDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())  # one write of an append is whole: the first line is the first rank that failed
    finally:
        os.close(file)


def die_with_launcher() -> None:
    """In a rank: end at once when the starting process is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="launcher").start()


def run_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run ``geoalign`` with ``arguments`` as ``count`` ranks; prints why it ended and returns the exit code.

    SIGINT and SIGTERM are passed on, each time once to every rank. When a rank fails, the others end by themselves at
    their next collective, or are killed after ``GRACE_S``. A signal that ended the ranks ends this process too.
    """
    with private_folder("geoalign-ranks-") as folder, _started(count, arguments, str(folder)) as ranks:
        with _passing_signals_on(ranks) as passed_on:
            codes = _wait(ranks)
        ending = how_it_ended(codes, _words(folder), passed_on)
    if ending.text:
        print(f"geoalign: {ending.text}", file=sys.stderr)
    if ending.signal is not None:
        signal.signal(ending.signal, signal.SIG_DFL)
        os.kill(os.getpid(), ending.signal)
    return ending.exit_code


def how_it_ended(
    codes: Sequence[tuple[int, int | None]], words: Sequence[dict[str, Any]], passed_on: set[int]
) -> Ending:
    """The ending of a run from those of its ranks.

    Args:
        codes: (rank, exit code) in the order in which they ended; minus the signal that killed it, None: killed here.
        words: what ranks left, in that order.
        passed_on: signals that were passed on to them.
    """
    size = len(codes)
    killed = [(rank, -code) for rank, code in codes if code is not None and code < 0]
    for rank, number in killed:
        if number not in passed_on:
            name = signal.Signals(number).name
            hint = " (is memory short?)" if number == signal.SIGKILL else ""
            text = f"error: rank {rank} of {size} was ended by {name}{hint}; continue with --resume auto"
            return Ending(text, UserError.exit_code)
    if any(number == signal.SIGINT for _, number in killed):
        return Ending("interrupted", INTERRUPTED)
    if killed:
        return Ending("", 128 + killed[0][1], killed[0][1])
    if words:
        return Ending(words[0]["text"], words[0]["exit_code"])
    failed = next(((rank, code) for rank, code in codes if code), None)
    if failed is None:
        return Ending("", 0)
    return Ending(f"error: rank {failed[0]} of {size} failed with exit code {failed[1]}", failed[1] or 1)


@contextmanager
def _started(count: int, arguments: Sequence[str], folder: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks, killed at the end of the block if they have not ended by then."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), FOLDER: folder}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # one core each
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "geoalign", *arguments]
            # In a process group of its own, a rank gets a terminal's Ctrl-C once: from here.
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, process_group=0))
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def _passing_signals_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[set[int]]:
    """Pass SIGINT and SIGTERM on to the ranks, and stop and continue with them; gives the signals that came."""
    seen: set[int] = set()

    def to_all(number: int) -> None:
        for process in ranks:
            process.send_signal(number)  # not to one that has ended

    def pass_on(number: int, _: Any) -> None:
        seen.add(number)
        to_all(number)

    def pause(*_: Any) -> None:
        to_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        to_all(signal.SIGCONT)

    handlers = dict.fromkeys(_PASSED_ON, pass_on) | {signal.SIGTSTP: pause}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int | None]]:
    """(rank, exit code) in the order in which they end; None for those that were killed because another one failed."""
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=lambda r=rank, p=process: ended.put((r, p.wait())), daemon=True).start()
    codes: list[tuple[int, int | None]] = []
    deadline: float | None = None
    while len(codes) < len(ranks):
        try:
            rank, code = ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            known = {rank for rank, _ in codes}
            for late in (rank for rank in range(len(ranks)) if rank not in known):
                ranks[late].kill()
                codes.append((late, None))
            break
        codes.append((rank, code))
        if code not in (0, Stopped.exit_code) and deadline is None:
            deadline = time.monotonic() + GRACE_S
    return codes


def _words(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / _WORDS).read_text().splitlines()]
    except FileNotFoundError:
        return []
