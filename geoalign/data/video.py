"""Video files: exact-frame reading and atomic writing with PyAV.

Frame index i always means the i-th frame in presentation order that a player shows. The reader takes the time stamps
of all packets first (no decoding), seeks to the key frame before the wanted frames and identifies every decoded frame
by its time stamp; where stamps cannot be believed (:mod:`geoalign.data.timeline`), or a seek lands late, it decodes
from the start and counts. Pixels are those that a player shows (:mod:`geoalign.data.picture`). Broken streams raise
``DataError``; nothing is concealed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np
import torch
from torch import Tensor

from geoalign.data.container import location, opened
from geoalign.data.frames import to_uint8
from geoalign.data.picture import Look
from geoalign.data.timeline import Timeline, facts, scan
from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_path

_LOG = logging.getLogger(__name__)
_BT709, _LIMITED_RANGE = 1, 1
_SCANS_KEPT = 64


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a container says about its film.

    Attributes:
        frames: number of frames that a player shows.
        height, width: as shown, turned upright and with square pixels.
        fps: frames per second, of a variable rate the mean; 0 if unknown.
        constant_rate: whether frames are evenly spaced.
        codec: FFmpeg's name.
        remarks: what is odd about the film although it is read ("interlaced, ...").
    """

    frames: int
    height: int
    width: int
    fps: float
    constant_rate: bool
    codec: str
    remarks: tuple[str, ...] = ()


@runtime_checkable
class VideoReader(Protocol):
    """Reads frames by index; every implementation returns the same frames of the same file."""

    name: str

    def probe(self, path: Path) -> VideoInfo:
        """Count frames, measure the rate and look at the first frame.

        Raises DataError naming ``path`` if it cannot be read, is cut off, or if its colours or its rotation cannot be
        shown right.
        """
        ...

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Read frames ``indices`` (any order, repeats allowed) as uint8 RGB ``[F, 3, H, W]``.

        ``size = (H, W)`` scales each frame to cover it and cuts the centre. Raises DataError naming ``path`` if the
        file is broken or has too few frames.
        """
        ...


class PyAVReader:
    """The CPU reader: every container and codec that FFmpeg knows."""

    name = "pyav"

    def __init__(self) -> None:
        self._scan = lru_cache(maxsize=_SCANS_KEPT)(lambda path, changed: scan(path))

    def probe(self, path: Path) -> VideoInfo:
        """See :class:`VideoReader`; of an mp4 the index and the first frames are read, of others all packets."""
        found = facts(path)
        look = found.look
        return VideoInfo(
            found.frames, look.height, look.width, found.fps, found.constant_rate, found.codec, look.remarks
        )

    def timeline(self, path: Path) -> Timeline:
        """The frames of the film; remembered until the file changes. Raises DataError if it is damaged."""
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: no such video file") from error
        return self._scan(path, (stat.st_size, stat.st_mtime_ns))

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`VideoReader`. Frames are resized one by one, so memory is that of the result."""
        timeline = self.timeline(path)
        check_indices(path, indices, timeline.frames)
        first, last, wanted = min(indices), max(indices), set(indices)
        stamps, look, found = timeline.stamps, timeline.look, dict[int, Tensor]()
        if stamps is not None:
            # Transport streams are seeked by decoding time and may land behind the key frame: nothing decodes there.
            with opened(path) as film, suppress(av.error.InvalidDataError):
                film.container.seek(int(stamps[first]), stream=film.stream)
                index_of = {stamp: index for index, stamp in enumerate(stamps.tolist())}
                numbered = ((index_of.get(frame.pts, -1), frame) for frame in film.container.decode(film.stream))
                found = _collect(path, numbered, wanted, last, look, size)
        if len(found) < len(wanted):
            with opened(path) as film:  # from the very first packet, which not every seek reaches
                found = _collect(path, enumerate(film.container.decode(film.stream)), wanted, last, look, size)
        if len(found) < len(wanted):
            raise DataError(
                f"{path}: {len(found)} of the {len(wanted)} frames asked for decode, though the container lists "
                f"{timeline.frames}; re-download it, or re-encode to mp4"
            )
        return torch.stack([found[index] for index in indices])


def probe_clip(reader: VideoReader, path: Path) -> VideoInfo:
    """Probe what a verb is going to use: :meth:`VideoReader.probe`, and the one rule for variable frame rates.

    Camera paths and windows are counted in frames, so a second must hold the same number of them everywhere.

    Raises:
        DataError: as ``probe``, or the frame rate varies.
    """
    info = reader.probe(path)
    if not info.constant_rate:
        raise DataError(
            f"{path}: variable frame rate; re-encode at a constant rate, e.g. ffmpeg -i IN -fps_mode cfr -r "
            f"{max(round(info.fps), 1)} OUT"
        )
    return info


@cache
def warn_once(path: Path, remarks: tuple[str, ...]) -> None:
    """Log what is odd about a file that is used all the same, once in a process."""
    for remark in remarks:
        _LOG.warning("%s: %s", path, remark)


def check_indices(path: Path, indices: Sequence[int], frames: int) -> None:
    """Raise UsageError if no frame is asked for, DataError if one that ``path`` does not have."""
    if not indices:
        raise UsageError(f"{path}: no frames asked for")
    if min(indices) < 0 or max(indices) >= frames:
        raise DataError(f"{path}: frames {min(indices)}..{max(indices)} asked for, but it has {frames}")


def read_video(
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Read frames of a video file as uint8 RGB ``[F, 3, H, W]``.

    Args:
        path: file of any container and codec that FFmpeg knows.
        indices: frame numbers in presentation order; default ``start, start + stride, ...``.
        start: first frame when ``indices`` is not given.
        stride: step when ``indices`` is not given.
        count: number of frames when ``indices`` is not given; default to the end.
        size: (H, W) to scale to cover and centre-crop to.

    Raises:
        DataError: the file is missing, truncated, damaged or too short; the message names it.
    """
    reader, path = PyAVReader(), Path(path)
    if indices is None:
        stop = reader.probe(path).frames if count is None else start + count * stride
        indices = range(start, stop, stride)
    return reader.read(path, indices, size)


def write_video(
    path: str | os.PathLike[str],
    frames: Tensor | np.ndarray[Any, Any],
    fps: float,
    *,
    codec: str = "libx264",
    crf: int = 16,
    lossless: bool = False,
    key_interval: int = 24,
) -> None:
    """Write a video atomically; equal input gives equal bytes (one encoder thread).

    Colours are written as limited-range BT.709 and tagged so, whatever the size; lossless files hold RGB.

    Args:
        path: destination; the suffix names the container.
        frames: uint8 ``[F, H, W, 3]``, or float in [-1, 1] ``[F, 3, H, W]``.
        fps: frames per second.
        codec: an FFmpeg encoder; yuv420p encoders need even sizes.
        crf: constant quality (lower is better).
        lossless: exact RGB (``libx264rgb`` at quantiser 0 in mp4); ``codec`` and ``crf`` are ignored.
        key_interval: largest distance of key frames; short groups make random access cheap.

    Raises:
        UsageError: wrong shape or an odd size for a subsampled encoder.
    """
    pixels = _as_uint8(frames)
    _, height, width, _ = pixels.shape
    if lossless:
        codec, pixel_format, options = "libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"}
    else:
        pixel_format, options = "yuv420p", _encoder_options(codec, crf)
        if height % 2 or width % 2:
            raise UsageError(f"{path}: {codec} needs even sizes, got {height} x {width}; use lossless=True")
    with atomic_path(path) as temporary, av.open(location(temporary), "w", format=_container(path)) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(60_000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.gop_size, context.thread_count = key_interval, 1
        if not lossless:  # RGB needs no matrix; x264 says so itself
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if not lossless:
                frame = frame.reformat(format=pixel_format, dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _container(path: str | os.PathLike[str]) -> str:
    """FFmpeg's name of the container that the suffix of ``path`` names; the file is written under another name."""
    suffix = os.path.splitext(path)[1].lower().lstrip(".")
    return {"mkv": "matroska", "m4v": "mp4"}.get(suffix, suffix)


def _encoder_options(codec: str, crf: int) -> dict[str, str]:
    if codec.startswith("libvpx"):
        return {"crf": str(crf), "b:v": "0", "cpu-used": "5"}
    options = {"crf": str(crf), "preset": "veryfast"}
    return options | {"x265-params": "log-level=none"} if codec == "libx265" else options


def _as_uint8(frames: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    tensor = torch.as_tensor(frames)
    if tensor.is_floating_point() and tensor.dim() == 4 and tensor.shape[1] == 3:
        tensor = to_uint8(tensor.detach().cpu()).permute(0, 2, 3, 1)
    if tensor.dtype != torch.uint8 or tensor.dim() != 4 or tensor.shape[-1] != 3 or not len(tensor):
        raise UsageError(
            f"frames must be uint8 [F, H, W, 3] or float [F, 3, H, W], got {tensor.dtype} {list(tensor.shape)}"
        )
    return np.ascontiguousarray(tensor.numpy())


def _collect(
    path: Path,
    numbered: Iterator[tuple[int, Any]],
    wanted: set[int],
    last: int,
    look: Look,
    size: tuple[int, int] | None,
) -> dict[int, Tensor]:
    """Pictures by index up to ``last``; none if the numbers are not those of consecutive frames."""
    found: dict[int, Tensor] = {}
    previous = -1
    for index, frame in numbered:
        if index < 0 <= previous or (previous >= 0 and index != previous + 1):
            return {}
        previous = index
        if index in wanted and not frame.is_corrupt:
            found[index] = look.pixels(path, frame, size)
        if index >= last:  # decoders emit in presentation order
            break
    return found
