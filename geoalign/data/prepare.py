"""Encode every conditioning window once, before training: latents, text, source cameras and captions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.data.cache import CacheFolder, Entry, Settings, content_hash, trim_tokens, window_key
from geoalign.data.captions import prompt_of
from geoalign.data.clips import ClipRecord, list_clips
from geoalign.data.frames import to_float
from geoalign.data.loader import CameraEstimate, ClipLoader, cause_of
from geoalign.data.readers import local_device, open_reader
from geoalign.data.tally import Tally
from geoalign.errors import ConfigError, DataError


class WindowEncoder(Protocol):
    """Turns a decoded window into what the policy consumes.

    Attributes:
        identity: names and hashes of everything that changes the result; part of the cache key.
    """

    identity: Mapping[str, str]

    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        """Tensors of one window ``[F, 3, H, W]`` in [-1, 1]; text embeddings are called ``context`` and ``negative`` ``[L, D]``."""
        ...

    def caption(self, frames: Tensor) -> str | None:
        """A generated caption, or None if this encoder has no captioner."""
        ...

    def estimate_camera(self, frames: Tensor) -> CameraEstimate | None:
        """Metric camera of a clip without a camera file, or None if this encoder has no estimator."""
        ...


@dataclass(slots=True)
class PrepareReport:
    """What a run of :func:`prepare` did (this rank's share)."""

    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    bytes: int = 0
    tally: Tally | None = None


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The data settings that change what is stored; the decoder is one of them (readers differ in colour rounding)."""
    clips = config.clips
    return {
        "format": 1,
        "num_frames": config.num_frames,
        "size": [config.height, config.width],
        "stride": clips.stride,
        "reader": clips.reader,
        "camera": clips.camera,
        "default_focal": clips.default_focal,
        "caption": [clips.caption, clips.caption_text],
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

    A window belongs to the rank given by its key, so ranks never share work, whatever was prepared before and by
    however many ranks. Unusable clips are skipped and counted.

    Args:
        config: the data section.
        encoder: what to compute.
        rank: this process.
        world_size: number of processes.
        device_id: GPU of the DALI reader; None takes the current one, or the CPU without any.
        limit: encode at most this many windows.
        dry_run: encode (to measure) but write nothing.
        progress: called with (windows done, windows of all ranks).

    Raises:
        DataError: no clips, or more than ``clips.max_bad_fraction`` of them unusable.
    """
    settings: Settings = {"data": data_settings(config), "encoder": dict(encoder.identity)}
    folder = CacheFolder(config.cache, settings)
    tally = Tally("clips")
    records = list_clips(config.clips_path, config.clips, tally)
    loader = ClipLoader(
        config,
        open_reader(config.clips.reader, local_device() if device_id is None else device_id),
        encoder.estimate_camera,
    )
    known = folder.entries().keys()
    report, begin = PrepareReport(tally=tally), time.perf_counter()
    for number, record in enumerate(records):
        try:
            facts = file_facts(record.path)
            for start in chosen_starts(loader.starts(record), config.prepare.windows_per_clip):
                key = window_key(record, facts["content"], start, settings)
                if int(key, 16) % world_size != rank:
                    continue
                if key in known:
                    report.reused += 1
                    continue
                entry, tensors = _encode(config, encoder, loader, record, start, key, facts)
                report.encoded += 1
                report.bytes += sum(value.nbytes for value in tensors.values())
                if not dry_run:
                    folder.add(entry, tensors)
        except DataError as error:
            tally.accepted -= 1
            tally.reject(record.clip_id, cause_of(error, record))
            tally.check(config.clips.max_bad_fraction)
        progress(number + 1, len(records))
        if limit is not None and report.encoded >= limit:
            break
    if not dry_run:
        mine = [key for key in folder.parts() if int(key, 16) % world_size == rank]
        for first in range(0, len(mine), config.prepare.clips_per_shard):
            folder.pack(mine[first : first + config.prepare.clips_per_shard])
    report.seconds = time.perf_counter() - begin
    return report


def chosen_starts(starts: range, count: int) -> list[int]:
    """``count`` starts (fewer if there are not that many) spread evenly over ``starts``."""
    count = min(count, len(starts))
    if count == 1:
        return [starts[(len(starts) - 1) // 2]]
    return [starts[round(i * (len(starts) - 1) / (count - 1))] for i in range(count)]


def file_facts(path: Path) -> dict[str, Any]:
    """Content hash, size and modification time of a clip."""
    content = content_hash(path)
    status = path.stat()
    return {"content": content, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _encode(
    config: DataConfig,
    encoder: WindowEncoder,
    loader: ClipLoader,
    record: ClipRecord,
    start: int,
    key: str,
    facts: Mapping[str, Any],
) -> tuple[Entry, dict[str, Tensor]]:
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
    return Entry(key, record.clip_id, start, str(record.path), caption=prompt, **facts), tensors
