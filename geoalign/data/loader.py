"""Decoding windows of clips together with their source cameras."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.clip_record import ClipRecord
from geoalign.data.frames import to_float
from geoalign.data.video import VideoInfo, VideoReader, probe_clip
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import CameraFile
from geoalign.geometry.cameras.door import open_camera, split_name
from geoalign.geometry.lens import cover_crop_intrinsics
from geoalign.geometry.trajectory import CameraTrajectory

_SAME_RATE = 1.02  # 23.976 and 24 are one rate, 24 and 25 are two
CameraEstimate = tuple[CameraTrajectory, Tensor | None]
"""Source camera ``[F]`` relative to frame 0, metres, and the ground plane ``[4]`` if known."""
CameraEstimator = Callable[[Tensor], CameraEstimate | None]
"""From frames ``[F, 3, H, W]`` in [-1, 1]; None if it cannot."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWindow:
    """A decoded window of a clip.

    Attributes:
        record: the clip.
        start: first frame in the file.
        frames: uint8 ``[F, 3, H, W]``.
        camera: ``[F]`` float64 relative to the window's first frame.
        ground_plane: ``[4]`` float64 in the first frame's camera axes, or None.
    """

    record: ClipRecord
    start: int
    frames: Tensor
    camera: CameraTrajectory
    ground_plane: Tensor | None


class ClipLoader:
    """Decodes windows of clips, with a bounded memory of recent ones; safe to call from two threads."""

    def __init__(
        self, config: DataConfig, reader: VideoReader, estimate_camera: CameraEstimator = lambda frames: None
    ) -> None:
        self._config = config
        self._reader = reader
        self._estimate_camera = estimate_camera
        self._recent: OrderedDict[tuple[str, int], LoadedWindow] = OrderedDict()
        self._budget = config.clips.keep_decoded_mb << 20
        self._info: dict[str, VideoInfo] = {}
        self._camera: dict[str, CameraFile] = {}
        self._lock = threading.Lock()
        self.decoded = 0

    @property
    def span(self) -> int:
        """Source frames that a window covers."""
        return (self._config.num_frames - 1) * self._config.clips.stride + 1

    def frames(self, record: ClipRecord) -> int:
        """Frames in the file; raises DataError if it is unreadable or of variable frame rate."""
        with self._lock:
            return self._probe(record).frames

    def starts(self, record: ClipRecord, frames: int = 0) -> range:
        """All window starts of a clip (frames in the file).

        Args:
            record: the clip.
            frames: frames in the file if known; 0 reads them from it.

        Raises:
            DataError: unreadable, too short or of variable frame rate.
        """
        frames = frames or self.frames(record)
        end = min(frames, record.end_frame or frames)
        count = end - record.start_frame - self.span + 1
        if count < 1:
            raise DataError(f"{record.path}: too short, {max(end - record.start_frame, 0)} of {self.span} frames")
        return range(record.start_frame, record.start_frame + count)

    def remarks(self) -> Counter[str]:
        """What is odd about the clips seen so far although they are used -> number of clips.

        Different frame rates are one remark: the stride counts frames, so the same window lasts longer at a lower rate.
        """
        with self._lock:
            seen = list(self._info.values())
        counts = Counter(remark for info in seen for remark in info.remarks)
        rates = [info.fps for info in seen if info.fps > 0]
        if rates and max(rates) > _SAME_RATE * min(rates):
            low, high = (self.span / rate for rate in (max(rates), min(rates)))
            counts[
                f"frame rates differ, {min(rates):g} to {max(rates):g} a second: windows of {self._config.num_frames} "
                f"frames at stride {self._config.clips.stride} last {low:.2f} to {high:.2f} s"
            ] = len(rates)
        return counts

    def load(self, record: ClipRecord, start: int, camera: CameraTrajectory | None = None) -> LoadedWindow:
        """Decode the window that starts at file frame ``start``; raises DataError if the clip is unusable.

        ``camera`` ``[F]`` replaces the clip's own camera (a prepared one).
        """
        with self._lock:
            key = (record.clip_id, start)
            if (window := self._recent.get(key)) is not None:
                self._recent.move_to_end(key)
                return window
            window = self._decode(record, start, camera)
            self.decoded += 1
            self._recent[key] = window
            size = window.frames.nbytes
            while len(self._recent) * size > self._budget and len(self._recent) > 1:
                self._recent.popitem(last=False)
            return window

    def check_camera(self, record: ClipRecord, start: int, *, may_estimate: bool) -> None:
        """Raise DataError if the window at ``start`` has no usable camera on disk, as :meth:`load` would.

        ``may_estimate``: a clip without a metric camera file is no error; a damaged file always is.
        """
        with self._lock:
            found = self._camera_on_disk(record, self._probe(record), self._indices(start))
        if found is None and not may_estimate:
            raise _no_camera(record)

    def _indices(self, start: int) -> list[int]:
        return list(range(start, start + self.span, self._config.clips.stride))

    def _probe(self, record: ClipRecord) -> VideoInfo:
        if (info := self._info.get(record.clip_id)) is None:
            info = self._info[record.clip_id] = probe_clip(self._reader, record.path)
        return info

    def _decode(self, record: ClipRecord, start: int, camera: CameraTrajectory | None) -> LoadedWindow:
        config = self._config
        info, size = self._probe(record), (config.height, config.width)
        indices = self._indices(start)
        found = None if camera is not None else self._camera_on_disk(record, info, indices)
        frames = self._reader.read(record.path, indices, size)
        if camera is not None:
            return LoadedWindow(record, start, frames, camera, None)
        if found is None:
            camera, plane = self._estimated(record, frames)
        else:
            lens = cover_crop_intrinsics(found[0].intrinsics, info.height, info.width, size)
            camera, plane = found[0].with_intrinsics(lens), found[1]
        return LoadedWindow(record, start, frames, camera, plane)

    def _camera_on_disk(self, record: ClipRecord, info: VideoInfo, indices: list[int]) -> CameraEstimate | None:
        """The configured static camera or the clip's camera file; None if it must be estimated from the frames."""
        policy, focal = self._config.clips.camera, self._config.clips.default_focal
        lens = (focal, focal * info.width / info.height, 0.5, 0.5)
        if policy == "none":
            return CameraTrajectory.identity(len(indices), lens, dtype=torch.float64), None
        if record.camera is None:
            return None
        if (camera := self._camera.get(record.clip_id)) is None:
            camera = open_camera(record.camera, image_size=(info.height, info.width))
            camera = self._camera[record.clip_id] = camera if camera.has_lens else camera.with_lens(lens)
        if not camera.metric and policy != "file_any_scale":
            return None
        if camera.path.num_frames <= indices[-1]:
            raise DataError(f"{record.camera}: {camera.path.num_frames} poses, frame {indices[-1]} is needed")
        return camera.window(indices)

    def _estimated(self, record: ClipRecord, frames: Tensor) -> CameraEstimate:
        estimate = self._estimate_camera(to_float(frames))
        if estimate is None:
            raise _no_camera(record)
        return estimate


def _no_camera(record: ClipRecord) -> DataError:
    return DataError(
        f"{record.path}: no metric camera file; run `geoalign prepare` with data.prepare.evaluator, or see "
        "data.clips.camera"
    )


def cause_of(error: DataError, record: ClipRecord) -> str:
    """The error without the file's name, so that equal causes are counted together."""
    message = str(error)
    for path in (record.path, record.camera, split_name(record.camera or "")[0]):
        message = message.removeprefix(f"{path}: ")
    return message
