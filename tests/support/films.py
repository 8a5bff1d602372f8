"""Small videos as phones, editors and players make them, written with PyAV, whose frames spell their own number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

BITS = 6


def spelled(count: int, height: int = 96, width: int = 128) -> np.ndarray[Any, Any]:
    """uint8 ``[F, H, W, 3]``: bright and red at the top left; six boxes along the bottom are the number in binary."""
    frames = np.full((count, height, width, 3), 60, np.uint8)
    frames[:, : height // 3, : width // 3] = (200, 40, 40)
    box = width // (BITS + 2)
    for index in range(count):
        for bit in range(BITS):
            frames[index, -(height // 4) :, box * (bit + 1) : box * (bit + 2)] = 235 if index >> bit & 1 else 16
    return frames


def number(picture: Tensor) -> int:
    """The number that ``[3, H, W]`` spells; -1 if the bright corner is not at the top left, so not upright."""
    _, height, width = picture.shape
    levels = picture.float().mean(0)
    corners = [levels[: height // 4, : width // 4], levels[: height // 4, -(width // 4) :]]
    if not corners[0].mean() > corners[1].mean() + 15:
        return -1
    row = levels[height - height // 8]
    box = width / (BITS + 2)
    return sum(int(row[int(box * (bit + 1.5))] > 125) << bit for bit in range(BITS))


def numbers(frames: Tensor) -> list[int]:
    """The numbers that ``[F, 3, H, W]`` spell."""
    return [number(picture) for picture in frames]


def bars(height: int, width: int, colours: Sequence[Sequence[int]], count: int = 3) -> np.ndarray[Any, Any]:
    """uint8 ``[F, H, W, 3]`` of vertical bars."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for index, colour in enumerate(colours):
        frames[:, :, width * index // len(colours) : width * (index + 1) // len(colours)] = colour
    return frames


def middles(picture: Tensor, count: int) -> np.ndarray[Any, Any]:
    """int ``[count, 3]``: the colour in the middle of each of ``count`` bars of ``[3, H, W]``."""
    _, height, width = picture.shape
    columns = [width * (2 * k + 1) // (2 * count) for k in range(count)]
    return picture[:, height // 2, columns].T.numpy().astype(int)


def film(
    path: Path,
    frames: np.ndarray[Any, Any],
    codec: str = "libx264",
    *,
    options: Mapping[str, str] | None = None,
    pixel_format: str = "yuv420p",
    fps: int = 24,
    stamps: Sequence[int] | None = None,
    setup: Callable[[Any], object] = lambda stream: None,
    **conversion: Any,
) -> Path:
    """Encode ``frames`` ``[F, H, W, C]`` at ``stamps`` (in frames); ``conversion`` goes to FFmpeg's scaler."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        setup(stream)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[-1] == 3 else "rgba")
            frame = frame.reformat(format=pixel_format, **conversion)
            frame.pts, frame.time_base = (index if stamps is None else stamps[index]), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, change: Callable[[Any], object] = lambda packet: None, **options: str) -> Path:
    """Copy the packets of a film into another container; ``change`` may move their stamps."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as container:
        stream = container.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                change(packet)
                packet.stream = stream
                container.mux(packet)
    return target


def tags(matrix: int = 2, *, full: bool = False, transfer: int = 2, primaries: int = 2) -> Callable[[Any], None]:
    """A ``setup`` that tags colours by their codes in ITU-T H.273 (2: not said)."""

    def apply(stream: Any) -> None:
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = matrix, transfer, primaries
        context.color_range = 2 if full else 1

    return apply
