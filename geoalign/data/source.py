"""Training conditions as pure functions of (seed, iteration, group): clip, window, target path and its speeds.

Nothing here depends on the rank, on the order of calls or on what was drawn before, so any number of ranks, a resumed
run and any reader see the same conditions. Clips and camera paths are drawn independently of each other (unpaired).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.captions import prompt_of
from geoalign.data.citywalk import ClipCamera, read_clip_camera
from geoalign.data.clips import ClipRecord, Split, in_split, list_clips
from geoalign.data.frames import cover_crop_intrinsics, to_float
from geoalign.data.readers import open_reader
from geoalign.data.tally import Tally
from geoalign.data.trajectories import PathRescaler, load_pool
from geoalign.data.video import VideoInfo, VideoReader
from geoalign.errors import DataError
from geoalign.geometry.rescale import RescaleResult
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import RetakeBatch, SourceClip
from geoalign_kernels import philox_uniform

STREAM_CLIP, STREAM_PATH = 2, 3
_CLIP_ATTEMPTS, _PATH_ATTEMPTS = 32, 256


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

    def __init__(self, config: DataConfig, reader: VideoReader) -> None:
        self._config = config
        self._reader = reader
        self._recent: OrderedDict[tuple[str, int], LoadedWindow] = OrderedDict()
        self._budget = config.clips.keep_decoded_mb << 20
        self._info: dict[str, VideoInfo] = {}
        self._camera: dict[str, ClipCamera] = {}
        self._lock = threading.Lock()
        self.decoded = 0

    @property
    def span(self) -> int:
        """Source frames that a window covers."""
        return (self._config.num_frames - 1) * self._config.clips.stride + 1

    def starts(self, record: ClipRecord) -> range:
        """All window starts of a clip (frames in the file).

        Raises:
            DataError: unreadable, too short or of variable frame rate.
        """
        with self._lock:
            info = self._probe(record)
        end = min(info.frames, record.end_frame or info.frames)
        count = end - record.start_frame - self.span + 1
        if count < 1:
            raise DataError(f"{record.path}: too short, {max(end - record.start_frame, 0)} of {self.span} frames")
        return range(record.start_frame, record.start_frame + count)

    def load(self, record: ClipRecord, start: int) -> LoadedWindow:
        """Decode the window that starts at file frame ``start``; raises DataError if the clip is unusable."""
        with self._lock:
            key = (record.clip_id, start)
            if (window := self._recent.get(key)) is not None:
                self._recent.move_to_end(key)
                return window
            window = self._decode(record, start)
            self.decoded += 1
            self._recent[key] = window
            size = window.frames.nbytes
            while len(self._recent) * size > self._budget and len(self._recent) > 1:
                self._recent.popitem(last=False)
            return window

    def _probe(self, record: ClipRecord) -> VideoInfo:
        if (info := self._info.get(record.clip_id)) is None:
            info = self._info[record.clip_id] = self._reader.probe(record.path)
        if not info.constant_rate:
            raise DataError(f"{record.path}: variable frame rate; re-encode at a constant rate")
        return info

    def _decode(self, record: ClipRecord, start: int) -> LoadedWindow:
        config = self._config
        info, size = self._probe(record), (config.height, config.width)
        indices = list(range(start, start + self.span, config.clips.stride))
        camera, plane = self._camera_of(record, info, indices)
        lens = cover_crop_intrinsics(camera.intrinsics, info.height, info.width, size)
        frames = self._reader.read(record.path, indices, size)
        return LoadedWindow(record, start, frames, camera.with_intrinsics(lens), plane)

    def _camera_of(
        self, record: ClipRecord, info: VideoInfo, indices: list[int]
    ) -> tuple[CameraTrajectory, Tensor | None]:
        policy, focal = self._config.clips.camera, self._config.clips.default_focal
        if policy == "none":
            lens = (focal, focal * info.width / info.height, 0.5, 0.5)
            return CameraTrajectory.identity(len(indices), lens, dtype=torch.float64), None
        if record.camera is None:
            raise DataError(f"{record.path}: no camera file; run `geoalign prepare` or set data.clips.camera=none")
        if (camera := self._camera.get(record.clip_id)) is None:
            camera = self._camera[record.clip_id] = read_clip_camera(record.camera, (info.height, info.width))
        if not camera.metric and policy != "file_any_scale":
            raise DataError(f"{record.camera}: scale-free camera; run `geoalign prepare` for metric ones")
        if camera.path.num_frames <= indices[-1]:
            raise DataError(f"{record.camera}: {camera.path.num_frames} poses, frame {indices[-1]} is needed")
        return camera.window(indices)


class RetakeDataset:
    """Stateless source of conditions.

    Args:
        config: the data section.
        seed: run seed.
        split: "train", "val" or "all".
        reader: video reader; default the configured one.

    Raises:
        DataError: no usable clips or camera paths.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, split: Split = "train", reader: VideoReader | None = None
    ) -> None:
        self.config, self.seed, self.split = config, seed, split
        self.clip_tally, self.path_tally = Tally("clips"), Tally("camera paths")
        listed = list_clips(config.clips_path, config.clips, self.clip_tally)
        self.clip_tally.check(config.clips.max_bad_fraction)
        self.clips = [record for record in listed if in_split(record, split, config.clips.val_fraction)]
        if not self.clips:
            raise DataError(f"{config.clips_path}: none of {len(listed)} clips is in split '{split}'")
        self.paths = load_pool(config.trajectories_path, config.num_frames, config.trajectories, self.path_tally, split)
        self.loader = ClipLoader(config, reader or open_reader(config.clips.reader))
        self.rescaler = PathRescaler(config.trajectories.rescale)
        self._pending: dict[tuple[int, tuple[int, ...]], Future[RetakeBatch]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="geoalign-data")
        self._waited = 0.0

    def batch(self, iteration: int, group_ids: Sequence[int]) -> RetakeBatch:
        """The conditions ``group_ids`` of ``iteration`` on the CPU, one per group, in that order.

        Raises:
            DataError: too many clips turn out to be unusable, or no camera path passes the guards.
        """
        begin = time.perf_counter()
        pending = self._pending.pop((iteration, tuple(group_ids)), None)
        result = pending.result() if pending else self._assemble(iteration, group_ids)
        self._waited += time.perf_counter() - begin
        return result

    def prefetch(self, iteration: int, group_ids: Sequence[int]) -> None:
        """Start preparing a batch in the background; the same call to :meth:`batch` then returns it."""
        key = (iteration, tuple(group_ids))
        if key not in self._pending:
            self._pending = {key: self._worker.submit(self._assemble, iteration, key[1])}

    def fingerprint(self) -> str:
        """Hash of clips, camera paths and settings; equal on every rank, stored to refuse a resume on other data."""
        digest = hashlib.sha256(self.config.model_dump_json(exclude={"root", "cache"}).encode())
        digest.update(self.paths.fingerprint().encode())
        for record in self.clips:
            digest.update(f"{record.clip_id}\0{record.start_frame}\0{record.end_frame}\0{record.caption}".encode())
        return digest.hexdigest()

    def telemetry(self) -> dict[str, float]:
        """Counters since the start: seconds waited for data, windows decoded, clips and paths rejected by cause."""
        values = {
            "data/wait_s": self._waited,
            "data/decoded_windows": float(self.loader.decoded),
            "data/bad_clips": float(len(self.clip_tally.rejected)),
            "data/paths_drawn": float(self.rescaler.drawn),
        }
        values |= {f"data/path_rejected_{name}": float(count) for name, count in self.rescaler.rejected.items()}
        return values | {f"data/path_adjusted_{name}": float(count) for name, count in self.rescaler.adjusted.items()}

    def draw_window(self, iteration: int, group: int) -> LoadedWindow:
        """Clip and window of a group; unusable clips are counted and drawn again (the same way on every rank)."""
        for attempt in range(_CLIP_ATTEMPTS):
            uniforms = philox_uniform(2, self.seed, iteration, group, 0, attempt, STREAM_CLIP).tolist()
            record = self.clips[int(uniforms[0] * len(self.clips))]
            try:
                starts = self.loader.starts(record)
                return self.loader.load(record, starts[int(uniforms[1] * len(starts))])
            except DataError as error:
                self._reject(record, error)
        raise DataError(
            f"no usable clip in {_CLIP_ATTEMPTS} draws for group {group} of iteration {iteration}\n"
            f"{self.clip_tally.summary()}"
        )

    def draw_path(self, iteration: int, group: int) -> RescaleResult:
        """Rescaled target path of a group; windows that a guard rejects are counted and drawn again."""
        for attempt in range(_PATH_ATTEMPTS):
            uniforms = philox_uniform(3, self.seed, iteration, group, 0, attempt, STREAM_PATH).tolist()
            index = int(uniforms[0] * len(self.paths))
            result = self.rescaler(self.paths.raw(index), self.paths.locate(index)[0].metric_scale, uniforms[1:])
            if result.accepted:
                return result
        raise DataError(
            f"no camera path passed the guards in {_PATH_ATTEMPTS} draws for group {group} of iteration {iteration}; "
            f"rejections so far: {dict(self.rescaler.rejected)}; see `geoalign data trajectories`"
        )

    def _reject(self, record: ClipRecord, error: DataError) -> None:
        if record.clip_id not in self.clip_tally.rejected:
            self.clip_tally.reject(record.clip_id, _cause(str(error), record))
            self.clip_tally.accepted -= 1
            self.clip_tally.check(self.config.clips.max_bad_fraction)

    def _assemble(self, iteration: int, group_ids: Sequence[int]) -> RetakeBatch:
        windows = [self.draw_window(iteration, group) for group in group_ids]
        paths = [self.draw_path(iteration, group).trajectory for group in group_ids]
        if self.config.trajectories.intrinsics == "source":
            paths = [
                path.with_intrinsics(window.camera.intrinsics[:1]) for path, window in zip(paths, windows, strict=True)
            ]
        planes = [window.ground_plane for window in windows]
        known = [plane for plane in planes if plane is not None]
        source = SourceClip(
            video=to_float(torch.stack([window.frames for window in windows])),
            camera=CameraTrajectory.stack([window.camera for window in windows]).to(dtype=torch.float32),
            ground_plane=torch.stack(known).float() if len(known) == len(planes) else None,
            clip_ids=tuple(f"{window.record.clip_id}@{window.start}" for window in windows),
        )
        prompts = tuple(prompt_of(window.record, self.config.clips) for window in windows)
        return RetakeBatch(source, CameraTrajectory.stack(paths).to(dtype=torch.float32), prompts)


def _cause(message: str, record: ClipRecord) -> str:
    """The error without the file's name, so that equal causes are counted together."""
    for path in (record.path, record.camera):
        message = message.removeprefix(f"{path}: ") if isinstance(path, Path) else message
    return message
