"""Several processes of one job: a rank or a worker dies at a random moment, or a scheduler signals all of them twice.

Ranks are forks that meet as torchrun's do, but nobody ends the others when one dies: they must notice by themselves.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from faults import Child, Ended, Fault, state_of
from patience import HANG_S, PATIENCE_S
from verbs import BY_NAME, SMALL, different, trained, windows

from geoalign.files.atomic import read_jsonl

DELAYS = (0.0, 0.05, 0.3, 2.0)
ENGINES = ("ddp", "fsdp")
GONE_S = HANG_S
"""How long a worker may outlive the training that it belongs to."""
_PREPARE = ("prepare", *SMALL, "data.prepare.clips_per_shard=2")


def train(engine: str) -> tuple[str, ...]:
    """The command of every rank."""
    return (
        "train", *SMALL, "train.iterations=4", "train.checkpoint_every=2", f"train.rank_timeout_s={HANG_S}",
        f"parallel.engine={engine}",
    )  # fmt: skip


class Job:
    """Two ranks of one command in one folder.

    Args:
        arguments: the command line of both.
        folder: where they run.
        faults: by rank.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, faults: Mapping[int, Fault] = {}) -> None:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.ranks = [
            Child(arguments, folder, faults.get(rank, Fault()), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def send(self, number: signal.Signals) -> None:
        """Signal all ranks that still run."""
        for rank in self.ranks:
            if _lives(rank.pid):
                os.kill(rank.pid, number)

    def wait(self) -> list[Ended]:
        """How they ended."""
        return [rank.wait() for rank in self.ranks]


class Groups:
    """Trials of jobs, each compared with what an undisturbed one leaves.

    Args:
        template: holds ``data``, the rendered world.
        work: scratch space for undisturbed jobs of two ranks.
        expected: by verb, what one undisturbed process leaves; windows and scores do not depend on who made them.
    """

    def __init__(self, template: Path, work: Path, expected: Mapping[str, Mapping[str, str]]) -> None:
        self._template, self._work, self._expected = template, work, expected
        self._ranks: dict[tuple[str, ...], tuple[Mapping[str, str], float]] = {}

    def dying_rank(self, folder: Path, number: int, draw: random.Random) -> tuple[str, str]:
        """A rank of training is killed: the other ends with one line or had all it needed."""
        arguments, rank = train(ENGINES[number // 2 % 2]), number % 2
        _, seconds = self._undisturbed(arguments)
        job = Job(arguments, folder)
        time.sleep(seconds * draw.random())
        if _lives(job.ranks[rank].pid):
            os.kill(job.ranks[rank].pid, signal.SIGKILL)
        return self._after(arguments, folder, job.wait(), ("another rank died or hangs", "the ranks did not meet"))

    def signalled(self, folder: Path, number: int, draw: random.Random) -> tuple[str, str]:
        """All ranks get SIGTERM twice: each ends as after one, and the stop wrote the checkpoint of its iteration."""
        arguments = train("ddp")
        job, delay, metrics = Job(arguments, folder), DELAYS[number % len(DELAYS)], folder / "run" / "metrics.jsonl"
        until(metrics.exists)
        time.sleep(0.3 * draw.random())
        job.send(signal.SIGTERM)
        time.sleep(delay)
        job.send(signal.SIGTERM)
        ended = job.wait()
        stopped = [one.code == 75 for one in ended]
        if any(stopped):
            rows, found = len(read_jsonl(metrics)), sorted((folder / "run" / "checkpoints").glob("step_??????"))
            if not all(stopped) or not found or found[-1].name != f"step_{rows:06d}":
                return "lost", f"{rows} rows, {found}, exit codes {[one.code for one in ended]}"
        kind, text = self._after(arguments, folder, ended)
        return kind, f"{delay} s apart: {text}"

    def dying_preparer(self, folder: Path, number: int, draw: random.Random) -> tuple[str, str]:
        """One of two processes that prepare windows is killed before a file operation."""
        job = Job(_PREPARE, folder, {number % 2: Fault("kill", 1 + draw.randrange(40))})
        return self._after(_PREPARE, folder, job.wait())

    def dying_worker(self, folder: Path, number: int, draw: random.Random) -> tuple[str, str]:
        """The process of a reward is killed, and answers as if nothing had been; or training is, and it ends too."""
        arguments = ("train", *SMALL, "rewards.geometry.placement=worker")
        environment = {"TMPDIR": str(folder / "scratch")}
        (folder / "scratch").mkdir(parents=True)
        truth = self._expected["train"]
        child = Child(arguments, folder, Fault(), environment)
        until(lambda: _children(child.pid))
        workers = _children(child.pid)
        if number % 4 < 2:  # between or inside two batches; else at any moment, most of which are start-up
            until((folder / "run" / "metrics.jsonl").exists)
        time.sleep(draw.random() * (0.5 if number % 4 < 2 else 5.0))
        victims = workers if number % 2 == 0 else [child.pid]
        for pid in victims:
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)
        ended = child.wait()
        until(lambda: not any(map(_lives, workers)), GONE_S)
        if orphans := [pid for pid in workers if _lives(pid)]:
            return "hang", f"workers {orphans} live on without their training"
        if ended.traceback:
            return "traceback", ended.text[-1500:]
        if ended.code == 0:
            text = different(truth, folder, trained)
            return ("accepted_wrongly" if text else "accepted_rightly"), text
        if ended.code not in (-signal.SIGKILL, 1) or (ended.code == 1 and not ended.clear_error):
            return "lost", ended.text[-1500:]
        again = Child((*arguments, "--resume", "auto"), folder, Fault(), environment).wait()
        text = again.text[-1500:] if again.code else different(truth, folder, trained)
        left = list((folder / "scratch").iterdir())
        kind = "clear_error" if ended.code == 1 else "accepted_rightly"
        return ("lost", text or f"left over: {left}") if text or left else (kind, ended.text[-300:])

    def _undisturbed(self, arguments: tuple[str, ...]) -> tuple[Mapping[str, str], float]:
        """What two ranks leave that nothing disturbs, and their seconds; run once."""
        if arguments not in self._ranks:
            folder = self._work / f"job{len(self._ranks)}"
            BY_NAME["train"].start(self._template, folder)
            began = time.monotonic()
            for ended in Job(arguments, folder).wait():
                if ended.code != 0:
                    raise SystemExit(f"an undisturbed job failed ({ended.code}):\n{ended.text}")
            self._ranks[arguments] = trained(folder), time.monotonic() - began
        return self._ranks[arguments]

    def _after(
        self, arguments: tuple[str, ...], folder: Path, ended: Sequence[Ended], may_end: Iterable[str] = ()
    ) -> tuple[str, str]:
        """Judge a disturbed job, let the next one finish, and compare."""
        for one in ended:
            if one.code is None or one.traceback:
                return ("hang" if one.code is None else "traceback"), one.text[-1500:]
            told = one.clear_error and any(text in one.text for text in may_end)
            if one.code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM) and not told:
                return "lost", f"exit code {one.code}: {one.text[-1500:]}"
        trains = arguments[0] == "train"
        truth = self._undisturbed(arguments)[0] if trains else self._expected["prepare"]
        if any(one.code != 0 for one in ended):
            continued = (*arguments, "--resume", "auto") if trains else arguments
            for again in Job(continued, folder).wait():
                if again.code != 0:
                    kind = "hang" if again.code is None else "traceback" if again.traceback else "lost"
                    return kind, f"the next job: {again.text[-1500:]}"
        text = different(truth, folder, trained if trains else windows)
        told = any(one.code == 1 for one in ended)
        return ("lost", text) if text else ("clear_error" if told else "accepted_rightly", "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds, or not longer than ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    return state_of(pid) not in ("Z", "")


def _children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        listed = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for text in listed for word in text.split()]
