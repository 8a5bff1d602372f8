"""Whole or not at all: modes, links, left-overs, full disks; one writer at a time, whoever died before."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from geoalign.errors import RunError, UsageError
from geoalign.files import atomic, locks
from geoalign.files.atomic import append_text, atomic_folder, atomic_path, atomic_write_text, remove_folder
from geoalign.files.locks import private_folder, writer_lock
from geoalign.files.sealed import write_tensors


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may become larger than 3,000 bytes: a full disk, in every library and language."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    atomic_write_text(tmp_path / "a.json", "{}")
    with atomic_path(tmp_path / "b.safetensors") as temporary:
        write_tensors({"w": torch.ones(2)}, temporary)
    with atomic_folder(tmp_path / "folder") as folder:
        write_tensors({"w": torch.ones(2)}, folder / "c.safetensors")
    for file in ("a.json", "b.safetensors", "folder/c.safetensors"):
        assert mode(tmp_path / file) == 0o666 & ~umask, file
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.safetensors", "folder"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    (dangling := tmp_path / "dangling").symlink_to(tmp_path / "disk" / "later.json")
    atomic_write_text(dangling, "made")
    assert dangling.is_symlink() and (tmp_path / "disk" / "later.json").read_text() == "made"


def test_a_full_disk_inside_safetensors_is_one_line_and_leaves_the_old_file(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("old")
    with (
        pytest.raises(RunError, match=r"w\.safetensors: cannot be written \(File too large\); free disk space"),
        atomic_path(path) as temporary,
    ):
        write_tensors({"w": torch.ones(5000)}, temporary)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_part_of_an_appended_line(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "metrics.jsonl"
    append_text(path, "a" * 2000 + "\n")
    with pytest.raises(OSError, match="File too large"):
        append_text(path, "b" * 2000 + "\n")
    assert path.read_text() == "a" * 2000 + "\n"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_inside_tensorboard_is_one_line(tmp_path: Path) -> None:
    from geoalign.config.training import RunConfig
    from geoalign.jobs.metrics_file import MetricsWriter

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(RunError, match=r"tb: cannot be written .*free disk space or bring the folder back"),
            MetricsWriter(tmp_path, RunConfig()) as writer,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            for iteration in range(400):
                writer.write(0, {f"number/{iteration}/{k}": 1.0 for k in range(20)})
                writer.path.unlink()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_errors_of_a_disk_name_the_place_and_the_fix(number: int, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, atomic.disk_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'x'}: cannot be written ({os.strerror(number)}); ") and "\n" not in text


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_deleted_by_the_next_writer(tmp_path: Path) -> None:
    host = "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())
    names = {
        f".geoalign-{host}-{dead_pid()}-0.tmp": False,
        f".geoalign-{host}-{os.getppid()}-0.tmp": True,  # alive
        ".geoalign-elsewhere-1-0.tmp": True,  # of another host, young
        ".geoalign-elsewhere-1-1.tmp": False,  # of another host, two days old
        ".hidden": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "new.tmp").touch()
    old = time.time() - 2 * 86400
    os.utime(tmp_path / ".geoalign-elsewhere-1-1.tmp", (old, old))
    deep = tmp_path / "b" / "c" / f".geoalign-{host}-{dead_pid()}-0.tmp"
    deep.mkdir(parents=True)
    atomic_write_text(tmp_path / "a", "")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert deep.exists()  # nobody has written there yet
    atomic.remove_leftovers(tmp_path)
    assert not deep.exists() and deep.parent.exists()
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_removed_folder_is_whole_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").touch()
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # killed before it deleted anything
    remove_folder(tmp_path / "step")
    assert not (tmp_path / "step").exists()


HOLD = """
import sys, time
from pathlib import Path
from geoalign.files.locks import writer_lock
with writer_lock(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def hold() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, holder: Callable[[], subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    first = holder()
    words = rf"run: another process writes this run \(host {socket.gethostname()}, process {first.pid}, for \d+ s\)"
    with pytest.raises(UsageError, match=words), writer_lock(tmp_path / "run", "run"):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with writer_lock(tmp_path / "run", "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert "process that is gone was taken over" in caplog.text
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("alive", [True, False])
def test_the_lock_of_another_machine_counts_while_its_heart_beats(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_WATCH_S", 0.4)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": time.time() - 300}))
    if alive:
        monkeypatch.setattr(locks.time, "sleep", lambda _: os.utime(lock))
        with pytest.raises(UsageError, match="host elsewhere, process 7, for 5 min"), writer_lock(tmp_path, "world"):
            pass
        assert json.loads(lock.read_text())["pid"] == 7
    else:
        with writer_lock(tmp_path, "world"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_lock_of_a_block_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writer_lock(tmp_path / "a" / "b", "run"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_private_folders_of_dead_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(locks.tempfile, "tempdir", str(tmp_path))
    (dead := tmp_path / "p-dead").mkdir()
    (dead / ".lock").touch()
    (young := tmp_path / "p-young").mkdir()  # its process may not have made the lock yet
    with private_folder("p-") as mine:
        with private_folder("p-") as other:
            assert mine.exists() and other.exists() and not dead.exists() and young.exists()
        assert mine.exists() and not other.exists()
    assert not mine.exists()
