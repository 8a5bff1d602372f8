"""Which frames a film has, in presentation order, and whether time stamps can name them.

A frame is what a player shows: packets that an edit list hides, and pictures before the first one that decodes, do not
count. Stamps are believed if every frame has its own and if they agree with the order in which the decoder gives the
first frames; stamps that only ever rise in decoding order although the stream has B-frames were invented (AVI knows no
presentation times, and remuxing keeps the invention). Frames of such a film are counted by decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from geoalign.data.container import Film, opened
from geoalign.data.picture import Look, look_of
from geoalign.errors import DataError

_HEAD = 4  # frames decoded to see whether stamps and decoder agree
_STATE_DURATION = frozenset({"flv", "matroska,webm"})
Stamps = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """The frames of a film.

    Attributes:
        frames: their number.
        stamps: int64 ``[frames]``, rising, in the time base of the stream; None where frames can only be counted.
        whole: every packet of the file is a frame that is shown.
        look: how they are shown.
        codec: FFmpeg's name of the decoder.
        tracks: video tracks in the file.
    """

    frames: int
    stamps: Stamps | None
    whole: bool
    look: Look
    codec: str
    tracks: int


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What a container says about its film, and how the film looks.

    Attributes:
        frames: their number, as :class:`Timeline` counts them.
        fps: frames per second, of a variable rate the mean; 0 if unknown.
        constant_rate: whether frames are evenly spaced.
        codec: FFmpeg's name of the decoder.
        look: how they are shown.
    """

    frames: int
    fps: float
    constant_rate: bool
    codec: str
    look: Look


@dataclass(frozen=True, slots=True)
class _Head:
    """The first frames: time stamps of the packets read for them (None: hidden), those of the frames, their look."""

    packets: list[int | None]
    frames: list[int | None]
    look: Look


def scan(path: Path) -> Timeline:
    """Take the time stamps of all packets and decode the first frames.

    Raises:
        DataError: no frames, fewer than the container states, or damaged ones.
    """
    with opened(path) as film:
        head = _head(path, film)
    with opened(path) as film:
        packets = _packets(path, film)
        reorders = bool(film.stream.codec_context.has_b_frames)
        codec, tracks = film.stream.codec_context.name, film.tracks
    shown = [stamp for stamp, hidden in packets if not hidden]
    stamps = _believed(shown, head, reorders)
    if stamps is None:
        with opened(path) as film:
            frames = sum(1 for _ in film.container.decode(film.stream))
        return Timeline(frames, None, False, head.look, codec, tracks)
    return Timeline(len(stamps), stamps, len(stamps) == len(packets), head.look, codec, tracks)


def facts(path: Path) -> Facts:
    """Count the frames and measure their rate; the index of an mp4 without hidden frames spares its packets.

    Raises:
        DataError: as :func:`scan`.
    """
    with opened(path) as film:
        stream, base = film.stream, film.stream.time_base
        rate = stream.average_rate or stream.guessed_rate or Fraction(0)
        times = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
        indexed = 0 < len(times) == stream.frames
        head = _head(path, film)
        codec = stream.codec_context.name
    if indexed and _plain(head):
        stamps = np.sort(np.asarray(times, dtype=np.int64))  # of decoding, but spaced like those of presentation
        return Facts(len(stamps), *_rate(stamps, base, rate), codec, head.look)
    timeline = scan(path)
    stamps = np.zeros(0, dtype=np.int64) if timeline.stamps is None else timeline.stamps
    return Facts(timeline.frames, *_rate(stamps, base, rate), codec, timeline.look)


def _head(path: Path, film: Film) -> _Head:
    packets: list[int | None] = []
    frames: list[int | None] = []
    look = None
    for packet in film.container.demux(film.stream):
        if packet.size:
            packets.append(None if packet.is_discard else packet.pts)
        for frame in packet.decode():
            look = look or look_of(path, film, frame)
            frames.append(frame.pts)
        if look is not None and len(frames) >= _HEAD:
            break
    if look is None:
        raise DataError(f"{path}: no frames")
    return _Head(packets, frames[:_HEAD], look)


def _plain(head: _Head) -> bool:
    """Whether the first frames are those of the first packets, in the order of their stamps."""
    stamps = sorted(stamp for stamp in head.packets if stamp is not None)
    return head.frames == stamps[: len(head.frames)]


def _packets(path: Path, film: Film) -> list[tuple[int | None, bool]]:
    """Stamp of every packet of the film in decoding order, and whether it is hidden."""
    stream, packets, ends = film.stream, [], []
    timed = film.format in _STATE_DURATION and film.container.duration
    for packet in film.container.demux() if timed else film.container.demux(stream):
        if packet.size == 0:  # the flush packet at the end
            continue
        if packet.pts is not None and packet.time_base:
            ends.append((packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream_index != stream.index:
            continue
        packets.append((packet.pts, packet.is_discard))
        if packet.is_corrupt:
            raise DataError(f"{path}: damaged packet {len(packets) - 1}; re-download or remove it")
    if len(packets) < stream.frames:
        raise DataError(f"{path}: truncated, {len(packets)} of {stream.frames} frames are in the file")
    if not packets:
        raise DataError(f"{path}: no frames")
    if timed and ends:
        _check_duration(path, film, float(max(ends)), len(packets))
    return packets


def _check_duration(path: Path, film: Film, end: float, frames: int) -> None:
    """Raise DataError if the tracks end before the stated length: by a second, in short films by a tenth."""
    stated = film.container.duration / 1_000_000
    if stated - end > max(min(1.0, 0.1 * stated), 3 * end / frames):
        there = f"{end:.2f} of {stated:.2f} seconds are there"
        raise DataError(f"{path}: cannot be decoded (cut off: {there}); re-download or remove it")


def _believed(shown: Sequence[int | None], head: _Head, reorders: bool) -> Stamps | None:
    """The rising stamps of the frames that decode, or None if they do not identify frames."""
    known = [stamp for stamp in shown if stamp is not None]
    first = head.frames[0]
    if len(known) < len(shown) or len(set(known)) < len(known) or first is None:
        return None
    if reorders and len(known) > 2 and all(earlier < later for earlier, later in pairwise(known)):
        return None
    stamps = np.sort(np.asarray(known, dtype=np.int64))
    stamps = stamps[stamps >= first]  # a film cut before an open group starts with pictures that lack their reference
    return stamps if stamps[: len(head.frames)].tolist() == head.frames else None


def _rate(stamps: Stamps, base: Fraction, stated: Fraction) -> tuple[float, bool]:
    """Frames per second, as stated unless rising ``stamps`` contradict it, and whether they are evenly spaced.

    Even means: up to the rounding of stamps (one tick) and a tenth of a frame.
    """
    if len(stamps) < 2:
        return float(stated), True
    steps, ticks = np.diff(stamps), int(stamps[-1] - stamps[0])
    middle = float(np.median(steps))
    constant = bool((np.abs(steps - middle) <= max(1.0, 0.1 * middle)).all())
    measured = float((len(stamps) - 1) / (ticks * base)) if ticks else 0.0
    agrees = stated and abs(measured / float(stated) - 1) <= 0.01 + 2 / max(ticks, 1)
    return float(stated) if agrees or not measured else measured, constant
