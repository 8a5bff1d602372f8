"""Video files: exact-frame reading and atomic writing with PyAV.

Frame index i always means the i-th frame in presentation order. The reader takes the time stamps of all packets first
(no decoding), seeks to the key frame before the wanted frames and identifies every decoded frame by its time stamp;
where a container has no usable stamps, or a seek lands late, it decodes from the start and counts. Broken streams
raise ``DataError``; nothing is concealed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np
import torch
from torch import Tensor

from geoalign.data.frames import cover_crop, to_uint8
from geoalign.errors import DataError, UsageError
from geoalign.io_utils import atomic_path

_THREADED_PIXELS = 640 * 360  # starting decoder threads costs more than decoding a smaller clip


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a container says about its first video stream."""

    frames: int
    height: int
    width: int
    fps: float
    constant_rate: bool
    codec: str


@runtime_checkable
class VideoReader(Protocol):
    """Reads frames by index; every implementation returns the same frames of the same file."""

    name: str

    def probe(self, path: Path) -> VideoInfo:
        """Count frames and measure the rate without decoding; raise DataError naming ``path`` if it cannot be read."""
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

    def probe(self, path: Path) -> VideoInfo:
        """See :class:`VideoReader`; mp4 and mkv indexes are read without touching the frames."""
        with _opened(path) as (container, stream):
            stamps = [entry.timestamp for entry in stream.index_entries]
            if stream.frames <= 0 or len(stamps) != stream.frames:
                stamps = _stamps(container, stream, path)[0]
            codec = stream.codec_context
            rate = stream.average_rate or stream.guessed_rate or Fraction(0)
            return VideoInfo(len(stamps), codec.height, codec.width, float(rate), _is_constant(stamps), codec.name)

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`VideoReader`. Frames are resized one by one, so memory is that of the result."""
        if not indices:
            raise UsageError(f"{path}: no frames asked for")
        with _opened(path) as (container, stream):
            stamps, reliable = _stamps(container, stream, path)
            first, last = min(indices), max(indices)
            if first < 0 or last >= len(stamps):
                raise DataError(f"{path}: frames {first}..{last} asked for, but it has {len(stamps)}")
            wanted, kind = set(indices), container.format.name
            found: dict[int, Tensor] = {}
            # Transport streams are seeked by decoding time and may land behind the key frame: nothing decodes there.
            with suppress(av.error.InvalidDataError):
                if reliable:
                    container.seek(stamps[first], stream=stream)
                    index_of = {stamp: index for index, stamp in enumerate(stamps)}
                    numbered = ((index_of.get(frame.pts, -1), frame) for frame in container.decode(stream))
                    found = _collect(numbered, wanted, last, size)
        if len(found) < len(wanted):
            with _opened(path) as (container, stream):  # from the very first packet, which not every seek reaches
                found = _collect(enumerate(container.decode(stream)), wanted, last, size)
        if len(found) < len(wanted):
            raise DataError(
                f"{path}: {len(found)} of the {len(wanted)} frames asked for decode, though the {kind} container lists "
                f"{len(stamps)}; re-download it, or re-encode to mp4"
            )
        return torch.stack([found[index] for index in indices])


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
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format=_container(path)) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(60_000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = key_interval
        stream.codec_context.thread_count = 1
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open ``path`` and its first video stream; everything FFmpeg raises inside becomes DataError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None or not context.width or not context.height:
                raise DataError(f"{path}: the video stream has no usable header; re-download or remove it")
            context.options = {"err_detect": "explode"}
            context.thread_type = "AUTO"
            context.thread_count = 1 if context.width * context.height < _THREADED_PIXELS else 0
            yield container, stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such video file") from None
    except (av.FFmpegError, ValueError, OSError, RuntimeError, OverflowError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); re-download or remove it") from error


def _stamps(container: Any, stream: Any, path: Path) -> tuple[list[int], bool]:
    """Time stamps of all frames in presentation order, and whether they identify frames."""
    total, stamps = 0, []
    for packet in container.demux(stream):
        if packet.size == 0:  # the flush packet at the end
            continue
        total += 1
        if not packet.is_discard:
            stamps.append(packet.pts)
        if packet.is_corrupt:
            raise DataError(f"{path}: damaged packet {total - 1}; re-download or remove it")
    if total < stream.frames:
        raise DataError(f"{path}: truncated, {total} of {stream.frames} frames are in the file")
    if not stamps:
        raise DataError(f"{path}: no frames")
    if any(stamp is None for stamp in stamps) or len(set(stamps)) < len(stamps):
        return list(range(len(stamps))), False
    return sorted(stamps), True


def _is_constant(stamps: list[int]) -> bool:
    """Whether frames are evenly spaced, up to the rounding of stamps (one tick) and a tenth of a frame."""
    steps = np.diff(np.sort(np.asarray(stamps, dtype=np.int64)))
    if not len(steps):
        return True
    middle = float(np.median(steps))
    return bool((np.abs(steps - middle) <= max(1.0, 0.1 * middle)).all())


def _collect(
    numbered: Iterator[tuple[int, Any]], wanted: set[int], last: int, size: tuple[int, int] | None
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for index, frame in numbered:
        if index in wanted and not frame.is_corrupt:
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            found[index] = picture if size is None else cover_crop(picture[None], size)[0]
        if index >= last:  # decoders emit in presentation order
            break
    return found
