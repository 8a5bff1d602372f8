"""Score a video file against a camera path: what is given once is checked once, then one video after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from geoalign.data.citywalk import read_clip_camera
from geoalign.data.frames import cover_crop_intrinsics, to_float
from geoalign.data.video import PyAVReader, VideoInfo
from geoalign.errors import DataError, RewardError, UserError
from geoalign.geometry.io import load_trajectory
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.running.guard import check_output
from geoalign.types import RetakeBatch, SourceClip


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What every video is compared with.

    Attributes:
        target: ``[F]`` wanted camera path; frames 0..F-1 of a video are scored.
        source: the source video; None: a video's own first frame stands for it.
        source_camera: camera npz of the source; None: its camera does not move.
        size: (H, W) to score at; None: that of the video.
    """

    target: CameraTrajectory
    source: Path | None = None
    source_camera: Path | None = None
    size: tuple[int, int] | None = None

    @property
    def frames(self) -> int:
        """F."""
        return self.target.num_frames

    def read(self, path: Path) -> tuple[Tensor, RetakeBatch, int]:
        """The scored frames ``[1, F, 3, H, W]`` in [-1, 1], their condition, and how many frames the file has."""
        info = probe(path, self.frames)
        size = self.size or (info.height, info.width)
        video = _pixels(path, self.frames, size)
        source, lens = video[:, :1].expand_as(video), info
        if self.source is not None:
            source, lens = _pixels(self.source, self.frames, size), probe(self.source, self.frames)
        camera, plane = CameraTrajectory.identity(self.frames, self.target.intrinsics[0], dtype=self.target.dtype), None
        if self.source_camera is not None:
            camera, plane = read_camera(self.source_camera, self.frames, (lens.height, lens.width))
            camera = camera.with_intrinsics(cover_crop_intrinsics(camera.intrinsics, lens.height, lens.width, size))
        clip = SourceClip(
            video=source,
            camera=CameraTrajectory.stack([camera.to(dtype=video.dtype)]),
            ground_plane=None if plane is None else plane[None].to(video.dtype),
            clip_ids=("video",),
        )
        target = CameraTrajectory.stack([self.target.to(dtype=video.dtype)])
        return video, RetakeBatch(clip, target, ("",), fps=info.fps), info.frames


def read_condition(
    trajectory: Path, source: Path | None, source_camera: Path | None, size: tuple[int, int] | None, needs_plane: bool
) -> Condition:
    """Read and check what all videos are compared with.

    Raises DataError naming the file that is missing, damaged, too short, or without the plane that is needed.
    """
    target = load_trajectory(trajectory)
    if target.num_frames < 2:
        raise DataError(f"{trajectory}: a path of 1 frame has no motion to score; give one of at least 2")
    if source is not None:
        probe(source, target.num_frames)
    if source_camera is not None:
        _, plane = read_camera(source_camera, target.num_frames, (1, 1))  # of the lens, only that there is one
        if needs_plane and plane is None:
            raise DataError(
                f"{source_camera}: no ground_plane [4] (n, d with n . X = d, metres; docs/data.md), which this "
                "evaluator stands on; add it, or use --evaluator mapanything --set evaluator_options.checkpoint=FOLDER"
            )
    return Condition(target, source, source_camera, size)


def probe(path: Path, frames: int) -> VideoInfo:
    """What a video's container says; raises DataError if it cannot be read or has fewer frames than the path."""
    info = PyAVReader().probe(path)
    if info.frames < frames:
        raise DataError(f"{path}: {info.frames} frames, but the trajectory has {frames}; give a path of {info.frames}")
    return info


def read_camera(path: Path, frames: int, image_size: tuple[int, int]) -> tuple[CameraTrajectory, Tensor | None]:
    """Camera ``[F]`` and ground plane ``[4]`` of a source; raises DataError if it is no camera or too short."""
    camera = read_clip_camera(path, image_size)
    if camera.path.num_frames < frames:
        raise DataError(f"{path}: cameras of {camera.path.num_frames} frames, but the trajectory has {frames}")
    return camera.window(list(range(frames)))


def _pixels(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    return to_float(PyAVReader().read(path, range(frames), size))[None]


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
    """A reward's answer for one video as plain numbers; None for what an invalid or lost video has not."""
    valid, lost = bool(output.valid[0]), bool(output.lost[0])
    read = valid and not lost
    row: dict[str, Any] = {f"score/{name}": float(value[0]) if read else None for name, value in output.scores.items()}
    row |= {name: None if lost else float(value[0]) for name, value in output.parts.items()}
    row |= {name: float(value[0]) for name, value in output.diagnostics.items()}
    row = {"valid": valid, "lost": lost, **row}
    return row if valid else row | {"error": "no finite score"}
