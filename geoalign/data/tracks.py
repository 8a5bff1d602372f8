"""Camera tracks: stretches of poses in one world frame, and the windows that may be cut from them."""

from __future__ import annotations

from dataclasses import dataclass

from geoalign.geometry.trajectory import CameraTrajectory


@dataclass(frozen=True, slots=True)
class CameraTrack:
    """Camera poses in one world frame, as a loader understood them.

    Attributes:
        name: unique name, ``scene/split``.
        path: ``[S]`` float64 poses and intrinsics; lengths in the archive's unit, metres after ``metric_scale``.
        fps: frames per second at which the track was recorded.
        starts: first frames of the usable windows (all frames of such a window are valid and consecutive).
        metric_scale: factor to metres, if the archive states one.
        held_out: whether the archive marks the track as test data (None: it does not say).
    """

    name: str
    path: CameraTrajectory
    fps: float
    starts: tuple[int, ...]
    metric_scale: float | None = None
    held_out: bool | None = None


def valid_runs(valid: list[bool], ids: list[int]) -> list[tuple[int, int]]:
    """Maximal stretches [start, stop) of valid frames whose ids are consecutive."""
    runs: list[tuple[int, int]] = []
    start: int | None = None
    for index, good in enumerate(valid):
        if start is not None and not (good and ids[index] == ids[index - 1] + 1):
            runs.append((start, index))
            start = None
        if good and start is None:
            start = index
    if start is not None:
        runs.append((start, len(valid)))
    return runs


def window_starts(runs: list[tuple[int, int]], num_frames: int, step: int) -> tuple[int, ...]:
    """Starts of windows of ``num_frames`` frames, every ``step`` frames inside each run."""
    return tuple(start for begin, stop in runs for start in range(begin, stop - num_frames + 1, step))
