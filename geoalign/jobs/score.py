"""Score a video file against a camera path: what is given once is checked once, then one video after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from geoalign.data.clip_record import VIDEO_SUFFIXES
from geoalign.data.frames import to_float
from geoalign.data.readers import AnyReader, shown_size
from geoalign.data.video import PyAVReader, VideoInfo, probe_clip, warn_once
from geoalign.errors import DataError, RewardError, UsageError, UserError, argument
from geoalign.evaluators.table import NEEDS_PLANE
from geoalign.geometry.cameras.content import read_content
from geoalign.geometry.cameras.door import camera_beside, is_preset, open_camera, split_name
from geoalign.geometry.lens import cover_crop_intrinsics
from geoalign.geometry.metrics import camera_errors
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory
from geoalign.jobs import arguments
from geoalign.jobs.sample_files import SIDE_BY_SIDE
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.running.guard import check_output
from geoalign.types import RetakeBatch, SourceClip

_LEAST = 2
"""Frames: fewer have no motion."""


def list_videos(path: Path) -> list[Path]:
    """A video, or those of a folder by name, without the side-by-side videos of ``geoalign sample``.

    Raises:
        DataError: there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such video")
        return [path]
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = (file for file in files if not file.name.endswith(SIDE_BY_SIDE))
    found = sorted(file for file in files if file.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise DataError(f"{path}: no video in this folder (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
    return found


@dataclass(frozen=True, slots=True)
class Source:
    """The video that a retake was made from, and its camera, as ``told_by`` says.

    Attributes:
        video: a file, or a folder of frames.
        camera: a file or ``FILE#CAMERA``.
        told_by: what named both, in words.
    """

    video: Path | None
    camera: str | None
    told_by: str = ""


def find_source(video: Path, trajectory: str, source: Path | None, camera: str | None) -> Source:
    """The given source; what is not given is looked for.

    The camera of a given source may lie beside it (``clip.npz`` of ``clip.mp4``). Of a retake that ``geoalign sample``
    wrote, its JSON tells both: given as the trajectory, or lying beside ``video``.

    Raises:
        DataError: a camera file beside the source is damaged.
    """
    if camera is not None:
        return Source(source, camera)
    if source is not None:
        found = camera_beside(source, shown_size)
        usable = found is not None and found.metric
        return Source(source, found.name, f"{found.name} beside it") if found and usable else Source(source, None)
    given = None if is_preset(trajectory) else split_name(trajectory)[0]
    for record in (given, video.with_suffix(".json")):
        if record is not None and record.is_file() and (told := _recorded(record)):
            return told
    return Source(None, None)


def _recorded(record: Path) -> Source | None:
    """What the JSON of ``geoalign sample`` says of its source; None of any other file."""
    try:
        content = read_content(record)
    except DataError:
        return None
    if not content.has("source_c2w", "target_c2w", "arguments") or "video" not in content.data["arguments"]:
        return None
    named = Path(content.data["arguments"]["video"])
    beside = record.parent / named.name  # the folder was moved, or the path counted from elsewhere
    return Source(named if named.exists() else beside, f"{record}#source", str(record))


@dataclass(frozen=True, slots=True, eq=False)
class ScoringTask:
    """What every video is compared with.

    Attributes:
        trajectory: wanted camera, a file or a preset.
        frames: F, frames 0..F-1 of a video are scored; None: all of them (a preset has no length of its own).
        source: the source video; None: a video's own first frame stands for it.
        source_camera: camera of the source, a file or a preset; None: its camera does not move.
        size: (H, W) to score at; None: that of the video.
        asked: what asks for ``frames``, in words; "" where they are those of the video.
    """

    trajectory: str
    frames: int | None
    source: Path | None = None
    source_camera: str | None = None
    size: tuple[int, int] | None = None
    asked: str = ""

    def read(self, path: Path) -> tuple[Tensor, RetakeBatch, int]:
        """The scored frames ``[1, F, 3, H, W]`` in [-1, 1], their condition, and how many frames the file has."""
        info = probe(path, self.frames or _LEAST, self.asked)
        frames, size = self.frames or info.frames, self.size or (info.height, info.width)
        video = _pixels(path, frames, size)
        source, lens = video[:, :1].expand_as(video), info
        if self.source is not None:
            lens = probe(self.source, frames, self.asked or f"the {frames} of {path}")
            source = _pixels(self.source, frames, size)
        target, _ = read_camera(self.trajectory, frames, (info.height, info.width), prefer="target")
        camera, plane = CameraTrajectory.identity(frames, target.intrinsics[0], dtype=target.dtype), None
        if self.source_camera is not None:
            camera, plane = read_camera(self.source_camera, frames, (lens.height, lens.width))
            camera = camera.with_intrinsics(cover_crop_intrinsics(camera.intrinsics, lens.height, lens.width, size))
        clip = SourceClip(
            video=source,
            camera=CameraTrajectory.stack([camera.to(dtype=video.dtype)]),
            ground_plane=None if plane is None else plane[None].to(video.dtype),
            clip_ids=("video",),
        )
        wanted = CameraTrajectory.stack([target.to(dtype=video.dtype)])
        return video, RetakeBatch(clip, wanted, ("",), fps=info.fps), info.frames


def read_condition(
    trajectory: str,
    source: Path | None,
    source_camera: str | None,
    size: tuple[int, int] | None,
    evaluator: str | None,
    frames: int | None = None,
    *,
    video: Path | None = None,
) -> ScoringTask:
    """Read and check what all videos are compared with.

    Args:
        trajectory: wanted camera, a file or a preset.
        source, source_camera: as they were given or found (:func:`find_source`).
        size: (H, W) to score at.
        evaluator: of the reward that scores, by name; None: it has none.
        frames: how many of each video; default: all poses of a file.
        video: whose source it is, for messages.

    Raises UserError naming the file that is missing, damaged, too short, or without the plane that is needed, or what
    the evaluator needs and nobody gave.
    """
    size = None if size is None else arguments.frame_size("size", size)
    _check_source(evaluator, source, source_camera, "" if video is None else f"{video}: ")
    given = frames is not None
    frames = _check_target(trajectory, frames)
    asked = "" if frames is None else argument("frames", frames) if given else f"the {frames} poses of {trajectory}"
    if source is not None:
        probe(source, frames or _LEAST, asked)
    if source_camera is not None:
        _, plane = open_camera(source_camera, frames=frames or _LEAST, intrinsics=DEFAULT_INTRINSICS).window([0])
        if evaluator in NEEDS_PLANE and plane is None:
            raise DataError(
                f"{source_camera}: no ground_plane [4] (n, d with n . X = d, metres; docs/data.md), which this "
                f"evaluator stands on; add it, or use {_other_evaluator()}"
            )
    return ScoringTask(trajectory, frames, source, source_camera, size, asked)


def _check_source(evaluator: str | None, source: Path | None, camera: str | None, of: str) -> None:
    """Refuse what would fail, or score against a source that is not there."""
    if evaluator in NEEDS_PLANE and camera is None:
        files = [argument(name, "FILE") for name in ("source", "source_camera")][evaluator != "planar" :]
        raise UsageError(
            f"{of}the {evaluator} evaluator needs the source's ground plane: give {' and '.join(files)} (with its "
            "ground plane; the JSON of `geoalign sample` beside a retake, or an npz beside the source, is found), or "
            f"use {_other_evaluator()}, which reads any video"
        )
    if evaluator == "planar" and source is None:
        file = argument("source", "FILE")
        raise UsageError(f"{of}the planar evaluator compares with the source frame by frame: give {file} as well")


def _other_evaluator() -> str:
    python = 'options={"evaluator": "mapanything", "evaluator_options": {"checkpoint": FOLDER}}'
    return argument("evaluator", "mapanything --set evaluator_options.checkpoint=FOLDER", python)


def _check_target(trajectory: str, frames: int | None) -> int | None:
    """The frames to score: ``frames``, else all poses of a file, else None for a preset at the length of the video."""
    if frames is not None and arguments.whole("frames", frames, 1) < _LEAST:
        raise UsageError(f"{argument('frames', frames)}: a path of {frames} has no motion to score; give at least 2")
    if frames is None and is_preset(trajectory):
        return None
    # Without its lens: whether that fits the videos shows when they are read.
    found = open_camera(trajectory, frames=frames, intrinsics=DEFAULT_INTRINSICS, prefer="target").path.num_frames
    if found < _LEAST:
        raise DataError(f"{trajectory}: a path of {found} frame has no motion to score; give one of at least 2")
    return frames or found


def probe(path: Path, frames: int, asked: str = "") -> VideoInfo:
    """What a video's container says.

    Args:
        path: the video.
        frames: how many of it are read, at least 2.
        asked: what asks for so many, in words.

    Raises DataError if it cannot be read, has a variable frame rate, or fewer frames.
    """
    info = probe_clip(AnyReader(PyAVReader()), path)
    warn_once(path, info.remarks)
    if info.frames < frames:
        if info.frames < _LEAST:
            raise DataError(f"{path}: a video of {info.frames} frame has no motion to score; give one of at least 2")
        raise DataError(f"{path}: {info.frames} frames, fewer than {asked}; use {argument('frames', info.frames)}")
    return info


def read_camera(
    name: str, frames: int, image_size: tuple[int, int], prefer: str | None = None
) -> tuple[CameraTrajectory, Tensor | None]:
    """First ``frames`` poses, relative to the first, and ground plane ``[4]``; arguments and errors of the door."""
    return open_camera(name, frames=frames, image_size=image_size, prefer=prefer).window(range(frames))


def _pixels(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    return to_float(AnyReader(PyAVReader()).read(path, range(frames), size))[None]


def score_video(path: Path, reward: Reward, task: ScoringTask) -> tuple[dict[str, Any], Tensor, RetakeBatch]:
    """All numbers of one video by name, and the tensors that were scored (:meth:`ScoringTask.read`).

    Raises:
        UserError: the video cannot be read, or lacks what the reward reads.
        RewardError: the reward failed.
    """
    video, batch, found = task.read(path)
    row: dict[str, Any] = {"video": str(path), "frames": video.shape[1], "video_frames": found}
    output = judge(reward, video, batch)
    return row | score_row(output) | camera_row(reward, video, batch, output.lost), video, batch


def judge(reward: Reward, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
    """Score ``videos`` ``[B, F, 3, H, W]``; non-finite scores are marked invalid.

    Raises RewardError for whatever the reward raises (out of memory, a bug), except errors that explain themselves.
    """
    try:
        return check_output(reward(videos, batch), reward.keys, len(videos))
    except UserError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        raise RewardError(f"reward {reward.name} failed ({type(error).__name__}: {message})") from error


def score_row(output: RewardOutput) -> dict[str, Any]:
    """A reward's answer for one video as plain numbers; an invalid or lost video has no scores: they are NaN."""
    valid, lost = bool(output.valid[0]), bool(output.lost[0])
    row: dict[str, Any] = {"valid": valid, "lost": lost} | ({} if valid else {"error": "no finite score"})
    row |= {f"score/{name}": float(value[0]) if valid else math.nan for name, value in output.scores.items()}
    return row | {name: float(value[0]) for name, value in {**output.parts, **output.diagnostics}.items()}


def camera_row(reward: Reward, video: Tensor, batch: RetakeBatch, lost: Tensor) -> dict[str, float]:
    """All camera errors (:data:`geoalign.geometry.metrics.CAMERA_METRICS`) of the one video that was just scored.

    Empty for a reward without a pose evaluator; the estimate of one with is not made anew. NaN where not defined, and
    all of them where the reward lost the camera (``lost`` ``[1]``).
    """
    evaluator = getattr(reward, "evaluator", None)
    if evaluator is None:
        return {}
    estimate = evaluator(video, batch.source)
    poses = estimate.c2w.masked_fill(lost[:, None, None, None], math.nan)
    errors = camera_errors(poses, batch.target_camera, estimate.frame_indices)
    return {name: float(value[0]) for name, value in errors.items()}
