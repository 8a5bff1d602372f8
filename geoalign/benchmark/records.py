"""What the parts of the benchmark exchange: the files of one case, a tool, and what a tool found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["ok", "failed"]


@dataclass(frozen=True, slots=True)
class CaseFiles:
    """One case as files, which is all that a tool sees of it.

    Attributes:
        name: of the case, unique in a benchmark and safe as a file name: ``METHOD/CLIP_camera_PATH_speed_S`` with ``/``
            replaced by ``__``.
        source_video: mp4 of the source, ``frames`` frames of the retake's size.
        retake_video: mp4 of the retake, ``frames`` frames.
        target: npz of the wanted path (:func:`geoalign.geometry.cameras.camera_file.write_clip_camera`), ``frames``
            poses, frame 0 the identity, metres, with the lens of the retake.
        frames: F.
    """

    name: str
    source_video: Path
    retake_video: Path
    target: Path
    frames: int


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool found in one case.

    Attributes:
        status: "failed" if any of it is missing; then nothing of it enters a mean.
        cause: one line that says why it failed, "" otherwise.
        metrics: finite numbers by the names in :attr:`Tool.metrics`.
        poses: npz of the camera read from the retake, or None for a tool that reads none: ``c2w`` ``[K, 4, 4]`` float64
            camera-to-world in metres, any world frame, and ``frames`` ``[K]`` int64, strictly increasing, from 0; where
            the tool finds the lens, ``intrinsics`` ``[K, 4]`` float64: fx, fy, cx, cy as fractions of (W, H, W, H).
    """

    status: Status
    cause: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    poses: Path | None = None


class Tool(Protocol):
    """A program in an environment of its own that measures a case from its files.

    Attributes:
        name: as tables print it.
        metrics: names of the numbers that it gives.
        gives_poses: whether it reads the camera, so that all camera errors are computed from its poses.
        licence: one line.
    """

    name: str
    metrics: tuple[str, ...]
    gives_poses: bool
    licence: str

    def measure(self, case_files: CaseFiles, out: Path) -> ToolResult:
        """Measure one case; may keep what it wrote under the folder ``out``, which nobody else uses.

        Never raises for a case: a program that is missing, raises, hangs or writes half a file is a failed result with
        its cause. A second call for the same case and ``out`` may take up what an earlier one left.
        """
        ...

    def contents(self) -> dict[str, str]:
        """What decides on its numbers beside a case, by name: definition, scripts, weights, and the installed version
        of each environment that is there."""
        ...

    def close(self) -> None:
        """End whatever processes it holds; may be called twice."""
        ...
