"""A tool that one process measures: ViPE, MEt3R, VBench, and whatever a YAML file of one's own describes."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geoalign.benchmark.records import CaseFiles, ToolResult
from geoalign.benchmark.tools.answers import read_camera, read_numbers, save_camera
from geoalign.benchmark.tools.settings import ToolSettings, contents_of
from geoalign.benchmark.tools.worker import ToolFailure, ToolWorker
from geoalign.errors import UserError
from geoalign.files.atomic import atomic_write_text
from geoalign.geometry.trajectory import CameraTrajectory

POSES = "poses.npz"


class WorkerTool:
    """A :class:`~geoalign.benchmark.records.Tool` whose answer comes from one worker."""

    def __init__(self, name: str, settings: ToolSettings) -> None:
        self.name, self.metrics = name, settings.metrics
        self.gives_poses, self.licence = settings.gives_poses, settings.licence
        self._settings, self._worker = settings, build_worker(settings, "worker")

    def measure(self, case_files: CaseFiles, out: Path) -> ToolResult:
        """See :class:`~geoalign.benchmark.records.Tool`."""
        with workplace(out) as work, caught(out, self._worker) as outcome:
            camera, numbers = self._worker.ask(
                request_of(case_files), work / "worker", lambda folder: self._read(folder, case_files.frames)
            )
            if camera is not None:
                save_camera(out / POSES, camera)
            outcome.append(ToolResult("ok", "", numbers, None if camera is None else out / POSES))
        return outcome[-1]

    def _read(self, folder: Path, frames: int) -> tuple[CameraTrajectory | None, dict[str, float]]:
        return (read_camera(folder, frames) if self.gives_poses else None), read_numbers(folder, self.metrics)

    def contents(self) -> dict[str, str]:
        """See :class:`~geoalign.benchmark.records.Tool`."""
        return contents_of(self._settings)

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def build_worker(settings: ToolSettings, name: str) -> ToolWorker:
    """The worker called ``name`` of a tool."""
    worker = settings.workers[name]
    return ToolWorker(worker.environment, worker, settings.environments[worker.environment])


def request_of(case_files: CaseFiles) -> dict[str, Any]:
    """What a runner is told of a case."""
    return {
        "source_video": str(case_files.source_video.absolute()),
        "retake_video": str(case_files.retake_video.absolute()),
        "frames": case_files.frames,
    }


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder under ``out`` for what runners write, empty at first and gone at the end; a kill's leftovers go too."""
    work = out / ".work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def caught(out: Path, *workers: ToolWorker) -> Iterator[list[ToolResult]]:
    """A list for the result, which gets the failed one when the block fails; what the workers printed is then kept.

    What fails on our side (memory of the device, a full disk) is a failure of the case too: the next may succeed.
    """
    outcome: list[ToolResult] = []
    for worker in workers:
        worker.log = ""
    try:
        yield outcome
    except Exception as error:  # told in the result and, with its place, in the log
        told = isinstance(error, ToolFailure)
        outcome.append(ToolResult("failed", str(error) if told else f"raised: {type(error).__name__}: {_line(error)}"))
        log = [worker.log for worker in workers if worker.log] + ([] if told else [traceback.format_exc()])
        if log:
            with contextlib.suppress(UserError):
                atomic_write_text(out / "failure.log", "\n".join(log))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
