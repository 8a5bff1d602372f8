"""Training conditions as pure functions of (seed, iteration, group): clip, window, target path and its speeds.

Nothing here depends on the rank, on the order of calls or on what was drawn before, so any number of ranks, a resumed
run and any reader see the same conditions. Clips and camera paths are drawn independently of each other (unpaired).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.cache import Entry, open_cache, pad_tokens
from geoalign.data.captions import prompt_of
from geoalign.data.clip_record import ClipRecord
from geoalign.data.clips import Split, in_split, list_clips
from geoalign.data.frames import to_float
from geoalign.data.loader import ClipLoader, LoadedWindow, cause_of
from geoalign.data.prepare import chosen_starts, data_settings
from geoalign.data.readers import local_device, open_reader
from geoalign.data.tally import Tally
from geoalign.data.trajectories import PathRescaler, draw_path, load_pool
from geoalign.data.video import VideoReader
from geoalign.errors import DataError
from geoalign.geometry.rescale import RescaleResult
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import Encodings, RetakeBatch, SourceClip
from geoalign_kernels import philox_uniform, streams

logger = logging.getLogger(__name__)
_CLIP_ATTEMPTS = 32


class RetakeDataset:
    """Stateless source of conditions.

    Args:
        config: the data section.
        seed: run seed.
        split: "train", "val" or "all".
        reader: video reader; default the configured one.
        encoder: identity of the encoder that the cache must have been made with; default: whatever there is.

    With ``data.use_cache`` the windows, cameras and captions are those that ``geoalign prepare`` stored, and batches
    carry the encoded tensors.

    Raises:
        DataError: no usable clips or camera paths.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        split: Split = "train",
        reader: VideoReader | None = None,
        encoder: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.seed, self.split = config, seed, split
        self.clip_tally, self.path_tally = Tally("clips"), Tally("camera paths")
        listed = list_clips(config.clips_path, config.clips, self.clip_tally)
        self.clip_tally.check(config.clips.max_bad_fraction)
        self.clips = [record for record in listed if in_split(record, split, config.clips.val_fraction)]
        if not self.clips:
            raise DataError(f"{config.clips_path}: none of {len(listed)} clips is in split '{split}'")
        self.paths = load_pool(config.trajectories_path, config.num_frames, config.trajectories, self.path_tally, split)
        self.loader = ClipLoader(config, reader or open_reader(config.clips.reader, local_device()))
        self.cache = open_cache(config.cache, data_settings(config), encoder) if config.use_cache else None
        self._entries = self._usable_entries()
        self._entry_of = {window_id(entry.clip_id, entry.start): entry for entry in self._entries}
        self._record_of = {record.clip_id: record for record in self.clips}
        self.rescaler = PathRescaler(config.trajectories.rescale)
        self._pending: dict[tuple[int, tuple[int, ...]], Future[RetakeBatch]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="geoalign-data")
        self._waited = 0.0
        self._told: set[str] = set()

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
        """Hash of clips, camera paths, cache and settings; equal on every rank, stored to refuse a resume on others."""
        digest = hashlib.sha256(self.config.model_dump_json(exclude={"root", "cache", "prepare"}).encode())
        digest.update("".join(entry.key for entry in self._entries).encode())
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
            uniforms = philox_uniform(2, self.seed, iteration, group, 0, attempt, streams.CLIP).tolist()
            if self.cache is None:
                record = self.clips[int(uniforms[0] * len(self.clips))]
                load = partial(self._any_window, record, uniforms[1])
            else:
                entry = self._entries[int(uniforms[0] * len(self._entries))]
                record = self._record_of[entry.clip_id]
                load = partial(self._cached_window, record, entry, self.cache.read(entry))  # a damaged cache is no clip
            try:
                return load()
            except DataError as error:
                self._reject(record, error)
        raise DataError(
            f"no usable clip in {_CLIP_ATTEMPTS} draws for group {group} of iteration {iteration}\n"
            f"{self.clip_tally.summary()}"
        )

    def draw_path(self, iteration: int, group: int) -> RescaleResult:
        """Rescaled target path of a group; windows that a guard rejects are counted and drawn again."""
        return draw_path(self.paths, self.rescaler, self.seed, iteration, group)[1]

    def prepared(self, clip_ids: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encoded tensors of the windows ``clip_ids`` of a batch, one dict each (empty without ``data.use_cache``)."""
        if self.cache is None:
            return [{} for _ in clip_ids]
        return [self.cache.read(self._entry_of[clip_id]) for clip_id in clip_ids]

    def _usable_entries(self) -> list[Entry]:
        """Prepared windows of this split whose clip is unchanged since, in a fixed order."""
        if self.cache is None:
            return []
        records = {record.clip_id: record for record in self.clips}
        found = []
        for entry in sorted(self.cache.entries().values(), key=lambda entry: (entry.clip_id, entry.start)):
            record = records.get(entry.clip_id)
            if record is None:
                continue
            if not entry.is_current(record, self.cache.settings):
                self.clip_tally.remarks["changed since it was prepared, not used"] += 1
            elif not self._is_chosen(record, entry):
                self.clip_tally.remarks["prepared window that the settings no longer choose, not used"] += 1
            else:
                found.append(entry)
        if not found:
            raise DataError(
                f"{self.cache.path}: no prepared window of split '{self.split}'; run `geoalign prepare` with the "
                "--config and settings of this run"
            )
        return found

    def _is_chosen(self, record: ClipRecord, entry: Entry) -> bool:
        """Whether ``prepare`` would store this window today: inside the clip's bounds, and one of those of its clip."""
        try:
            starts = self.loader.starts(record, entry.frames)
        except DataError:
            return False
        return entry.start in chosen_starts(starts, self.config.prepare.windows_per_clip)

    def _any_window(self, record: ClipRecord, uniform: float) -> LoadedWindow:
        starts = self.loader.starts(record)
        return self.loader.load(record, starts[int(uniform * len(starts))])

    def _cached_window(self, record: ClipRecord, entry: Entry, stored: Mapping[str, Tensor]) -> LoadedWindow:
        camera = CameraTrajectory(stored["camera.c2w"], stored["camera.intrinsics"])
        frames = self.loader.load(replace(record, camera=None), entry.start, camera).frames
        return LoadedWindow(
            replace(record, caption=entry.caption), entry.start, frames, camera, stored.get("camera.ground_plane")
        )

    def _reject(self, record: ClipRecord, error: DataError) -> None:
        if record.clip_id not in self.clip_tally.rejected:
            self.clip_tally.reject(record.clip_id, cause_of(error, record))
            self.clip_tally.accepted -= 1
            self.clip_tally.check(self.config.clips.max_bad_fraction)

    def _tell(self) -> None:
        """Log every kind of remark on the clips (what stands before its comma) when it first appears."""
        for remark in self.loader.remarks():
            if (kind := remark.partition(",")[0]) not in self._told:
                self._told.add(kind)
                logger.warning("clips used although: %s; `geoalign data check` counts them", remark)

    def _assemble(self, iteration: int, group_ids: Sequence[int]) -> RetakeBatch:
        windows = [self.draw_window(iteration, group) for group in group_ids]
        self._tell()
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
            clip_ids=tuple(window_id(window.record.clip_id, window.start) for window in windows),
        )
        if self.cache is None:
            prompts = tuple(prompt_of(window.record, self.config.clips) for window in windows)
        else:
            prompts = tuple(window.record.caption for window in windows)
        encodings = None if self.cache is None else stack_encodings(self.prepared(source.clip_ids))
        return RetakeBatch(source, CameraTrajectory.stack(paths).to(dtype=torch.float32), prompts, encodings)


def window_id(clip_id: str, start: int) -> str:
    """The name of a window in ``SourceClip.clip_ids``."""
    return f"{clip_id}@{start}"


def stack_encodings(windows: Sequence[Mapping[str, Tensor]]) -> Encodings:
    """Prepared tensors of B windows as one record; texts are padded with zero tokens to the longest."""

    def stacked(name: str) -> Tensor | None:
        parts = [window[name] for window in windows if name in window]
        if name in ("context", "negative"):
            length = max((len(text) for text in parts), default=0)
            parts = [pad_tokens(text, length) for text in parts]
        return torch.stack(parts) if parts else None

    return Encodings(*(stacked(name) for name in ("latents", "context", "image_tokens", "negative")))
