"""Opening a video file: the track that a player would show, and whether the file holds the bytes that it states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.stream import Disposition

from geoalign.errors import DataError

_THREADED_PIXELS = 640 * 360  # starting decoder threads costs more than decoding a smaller clip
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067  # Matroska and WebM
_MP4_BOXES = frozenset({b"moov", b"mdat", b"moof"})  # those that carry the film; others may be followed by anything
_MOST_BOXES = 100_000  # a fragment each second of a day; more are not looked at
_MP4_STARTS = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})


@dataclass(frozen=True, slots=True)
class Tags:
    """What the container says about the pictures before any is decoded (codes as FFmpeg numbers them)."""

    matrix: int
    range: int
    transfer: int
    primaries: int
    interlaced: bool
    alpha: bool
    aspect: Fraction
    """Width over height of one pixel."""


@dataclass(frozen=True, slots=True)
class Film:
    """An open container, its film track, and the number of video tracks; valid inside :func:`opened`."""

    container: Any
    stream: Any
    tags: Tags
    tracks: int

    @property
    def format(self) -> str:
        """FFmpeg's name of the container format."""
        return self.container.format.name


def location(path: str | os.PathLike[str]) -> str:
    """``path`` as FFmpeg must get it: absolute, or a colon in a relative name would be read as a protocol."""
    return os.path.abspath(path)


@contextmanager
def opened(path: Path) -> Iterator[Film]:
    """Open ``path`` at its film; everything that FFmpeg raises inside becomes DataError.

    Raises:
        DataError: missing, cut off, no video track, or whatever fails to decode in the body.
    """
    try:
        _check_length(path)
        with av.open(location(path)) as container:
            stream = _film_stream(container)
            if stream is None:
                raise DataError(f"{path}: no video stream")
            context = stream.codec_context
            if context is None or not context.width or not context.height:
                raise DataError(f"{path}: the video stream has no usable header; re-download or remove it")
            context.options = {"err_detect": "explode"}
            context.thread_type = "AUTO"
            context.thread_count = 1 if context.width * context.height < _THREADED_PIXELS else 0
            yield Film(container, stream, _tags(stream), len(container.streams.video))
    except FileNotFoundError:
        raise DataError(f"{path}: no such video file") from None
    except (av.FFmpegError, ValueError, OSError, RuntimeError, OverflowError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); re-download or remove it") from error


def _film_stream(container: Any) -> Any:
    """FFmpeg's own choice (the track marked default, then the one with more frames), but never a picture."""
    films = [stream for stream in container.streams.video if not stream.disposition & _NO_FILM]
    best = container.streams.best("video")
    return best if best in films else next(iter(films), None)


def _tags(stream: Any) -> Tags:
    context = stream.codec_context
    return Tags(
        matrix=context.colorspace,
        range=context.color_range,
        transfer=context.color_trc,
        primaries=context.color_primaries,
        interlaced=context.field_order in (2, 3, 4, 5),
        alpha={name.lower(): value for name, value in stream.metadata.items()}.get("alpha_mode") == "1",
        aspect=stream.sample_aspect_ratio or Fraction(1),
    )


def _check_length(path: Path) -> None:
    """Raise DataError if an mp4, mov, mkv or webm states more bytes than the file has: FFmpeg reads such a file as a
    shorter film."""
    size = path.stat().st_size
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _MP4_STARTS:
            end = _mp4_end(file, size)
        elif int.from_bytes(head[:4]) == _EBML:
            end = _matroska_end(file)
        else:
            return
    if end > size:
        raise DataError(
            f"{path}: cannot be decoded (cut off: {size} of {end} bytes are there); re-download or remove it"
        )


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Where the last box that the film needs ends."""
    position = end = 0
    for _ in range(_MOST_BOXES):
        if position >= size:
            break
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        length = int.from_bytes(head[8:16]) if length == 1 else length
        if kind in _MP4_BOXES:
            end = position + length
        if length < 8:  # 0: this box reaches to the end of the file
            break
        position += length
    return end


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment ends; 0 if its length is unknown (a live recording)."""
    file.seek(4)
    length, _ = _vint(file)
    file.seek(length, os.SEEK_CUR)
    if int.from_bytes(file.read(4)) != _SEGMENT:
        return 0
    length, unknown = _vint(file)
    return 0 if unknown else file.tell() + length


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """An EBML number, and whether it stands for "unknown" (all bits set)."""
    first = file.read(1)
    if not first or not first[0]:
        return 0, True
    width = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & ((1 << (7 - width)) - 1)]) + file.read(width))
    return value, value == (1 << (7 * (width + 1))) - 1
