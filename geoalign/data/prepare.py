"""Encode every conditioning window once, before training: latents, text, source cameras and captions."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.cache import CacheFolder, Entry, FileFacts, Settings, file_facts, trim_tokens, window_key
from geoalign.data.captions import CLEANING_VERSION, prompt_of
from geoalign.data.clip_record import ClipRecord
from geoalign.data.clips import list_clips
from geoalign.data.frames import to_float
from geoalign.data.loader import CameraEstimate, ClipLoader, cause_of
from geoalign.data.readers import READER_VERSION, open_reader
from geoalign.data.tally import Tally
from geoalign.errors import ConfigError, DataError, UsageError
from geoalign.files.atomic import remove_leftovers
from geoalign.files.locks import is_locked, writer_lock

logger = logging.getLogger(__name__)


class WindowEncoder(Protocol):
    """Turns a decoded window into what the policy consumes.

    Attributes:
        identity: names and hashes of everything that changes the result; part of the cache key.
    """

    @property
    def identity(self) -> Mapping[str, str]: ...

    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        """Tensors of one window ``[F, 3, H, W]`` in [-1, 1]; texts ``[L, D]`` are ``context`` and ``negative``."""
        ...

    def caption(self, frames: Tensor) -> str | None:
        """A generated caption, or None if this encoder has no captioner."""
        ...

    def estimate_camera(self, frames: Tensor) -> CameraEstimate | None:
        """Metric camera of a clip without a camera file, or None if this encoder has no estimator."""
        ...


@dataclass(slots=True)
class PrepareReport:
    """What a run of :func:`prepare` did (this rank's share; ``tally`` counts its clips)."""

    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    bytes: int = 0
    tally: Tally | None = None


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The data settings that change what is stored.

    The decoder is one of them (readers differ in colour rounding), and so is what this version makes of a file and of a
    text.
    """
    clips = config.clips
    return {
        "format": 1,
        "num_frames": config.num_frames,
        "size": [config.height, config.width],
        "stride": clips.stride,
        "reader": [clips.reader, READER_VERSION],
        "camera": clips.camera,
        "default_focal": clips.default_focal,
        "caption": [clips.caption, clips.caption_text, CLEANING_VERSION],
        "dtype": config.prepare.dtype,
    }


def prepare(
    config: DataConfig,
    encoder: WindowEncoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Encode this rank's missing windows and pack them into shards.

    A clip belongs to the rank given by its name, so ranks never share work, whatever was prepared before and by however
    many ranks, and each reads its own clips only. Unusable clips are skipped and counted.

    Args:
        config: the data section.
        encoder: what to compute.
        rank: this process.
        world_size: number of processes.
        device_id: GPU of the DALI reader; None decodes on the CPU.
        limit: encode at most this many windows.
        dry_run: encode (to measure) but write nothing.
        progress: called with (clips done, clips of this rank).

    Raises:
        UsageError: another process writes this rank's share of the cache.
        DataError: no clips, or of those of this rank none is usable or more than ``clips.max_bad_fraction`` are not.
    """
    settings: Settings = {"data": data_settings(config), "encoder": dict(encoder.identity)}
    folder = CacheFolder(config.cache, settings)
    if dry_run:
        return _prepare(config, encoder, folder, rank, world_size, device_id, limit, True, progress)
    with _cache_lock(folder, rank, world_size):
        for file in folder.set_defects_aside() if rank == 0 else ():
            logger.warning("%s: set aside, its windows are encoded again", file)
        return _prepare(config, encoder, folder, rank, world_size, device_id, limit, False, progress)


@contextmanager
def _cache_lock(folder: CacheFolder, rank: int, world_size: int) -> Iterator[None]:
    """Lock the share of this rank; refuses if processes of another division into ranks write the folder."""
    name = f".lock-{rank}-of-{world_size}"
    with writer_lock(folder.path, "cache", name):
        remove_leftovers(folder.path)
        for other in sorted(folder.path.glob(".lock-*")):
            if not other.name.endswith(f"-of-{world_size}") and (holder := is_locked(other)):
                raise UsageError(f"{folder.path}: another process writes this cache ({holder}); wait for it, or end it")
        yield


def _prepare(
    config: DataConfig,
    encoder: WindowEncoder,
    folder: CacheFolder,
    rank: int,
    world_size: int,
    device_id: int | None,
    limit: int | None,
    dry_run: bool,
    progress: Callable[[int, int], None],
) -> PrepareReport:
    listing = Tally("clips")
    records = [r for r in list_clips(config.clips_path, config.clips, listing) if owner(r.clip_id, world_size) == rank]
    rejected = {name: cause for name, cause in listing.rejected.items() if owner(name, world_size) == rank}
    tally = Tally("clips", len(records), rejected, listing.remarks)
    loader = ClipLoader(config, open_reader(config.clips.reader, device_id), encoder.estimate_camera)
    entries = folder.readable()
    hashed = defaultdict[str, list[FileFacts]](list)  # a clip that changed has entries of its former states too
    for entry in entries.values():
        hashed[entry.clip_id].append(entry.facts)
    report, begin = PrepareReport(tally=tally), time.perf_counter()
    for number, record in enumerate(records):
        try:
            starts = chosen_starts(loader.starts(record), config.prepare.windows_per_clip)
            facts = file_facts(record.path, *hashed[record.clip_id])
            for start in starts:
                if limit is not None and report.encoded >= limit:
                    break
                key = window_key(record, facts.content, start, folder.settings)
                if key in entries:
                    report.reused += 1
                    continue
                prompt, tensors = _encode(config, encoder, loader, record, start)
                report.encoded += 1
                report.bytes += sum(value.nbytes for value in tensors.values())
                if not dry_run:
                    told = {**asdict(facts), "caption": prompt, "frames": loader.frames(record)}
                    folder.add(Entry(key, record.clip_id, start, str(record.path), **told), tensors)
        except DataError as error:
            tally.accepted -= 1
            tally.reject(record.clip_id, cause_of(error, record))
            tally.check(config.clips.max_bad_fraction)
        progress(number + 1, len(records))
        if limit is not None and report.encoded >= limit:
            break
    tally.remarks.update(loader.remarks())
    if records and not report.encoded + report.reused:
        raise DataError(f"{config.clips_path}: nothing could be prepared\n{tally.summary()}")
    if not dry_run:
        mine = [key for key, entry in folder.parts().items() if owner(entry.clip_id, world_size) == rank]
        for first in range(0, len(mine), config.prepare.clips_per_shard):
            folder.pack(mine[first : first + config.prepare.clips_per_shard])
    report.seconds = time.perf_counter() - begin
    return report


def owner(name: str, world_size: int) -> int:
    """The rank that prepares the clip ``name``."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % world_size


def chosen_starts(starts: range, count: int) -> list[int]:
    """``count`` starts (fewer if there are not that many) spread evenly over ``starts``."""
    count = min(count, len(starts))
    if count == 1:
        return [starts[(len(starts) - 1) // 2]]
    return [starts[round(i * (len(starts) - 1) / (count - 1))] for i in range(count)]


def _encode(
    config: DataConfig,
    encoder: WindowEncoder,
    loader: ClipLoader,
    record: ClipRecord,
    start: int,
) -> tuple[str, dict[str, Tensor]]:
    """Prompt and tensors of a window."""
    window = loader.load(record, start)
    frames = to_float(window.frames)
    generated = encoder.caption(frames) if config.clips.caption == "blip2" else None
    if config.clips.caption == "blip2" and generated is None:
        raise ConfigError("data.clips.caption=blip2, but the encoder has no captioner; use clean, verbatim or constant")
    prompt = prompt_of(record, config.clips, generated)
    dtype = torch.bfloat16 if config.prepare.dtype == "bfloat16" else torch.float32
    tensors = {name: value.to(dtype) for name, value in encoder.encode(frames, prompt).items()}
    for name in tensors.keys() & {"context", "negative"}:
        tensors[name] = trim_tokens(tensors[name])
    # Cameras stay float64: they are small, and the source trajectory must not depend on the storage type.
    tensors |= {"camera.c2w": window.camera.c2w, "camera.intrinsics": window.camera.intrinsics}
    if window.ground_plane is not None:
        tensors["camera.ground_plane"] = window.ground_plane
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DataError(f"{record.path}: encoder produced non-finite {', '.join(bad)}")
    return prompt, tensors
