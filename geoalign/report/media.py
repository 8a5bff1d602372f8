"""Frames of films as data URIs: one picture a take, so that a page needs no network and no video codec."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
MAX_WIDTH = 320
MAX_FRAMES = 33
SMALL = 160
"""Pixels: frames up to this width are kept without loss and shown enlarged, wider ones are compressed."""
_ROW = 12  # up to this many frames stand in one row, which reads as a film strip; more are laid out in a square


@dataclass(frozen=True, slots=True)
class Sheet:
    """The frames of a take in one picture: F cells of ``width`` x ``height``, row by row in ``columns`` columns."""

    uri: str
    width: int
    height: int
    columns: int


def sheet(video: Array) -> Sheet:
    """Lay the frames of uint8 ``[F, 3, H, W]`` out in one WebP picture."""
    frames = [np.asarray(_image(frame)) for frame in video]
    height, width = frames[0].shape[:2]
    columns = len(frames) if len(frames) <= _ROW else math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = frame
    data = io.BytesIO()
    Image.fromarray(canvas).save(data, format="WEBP", lossless=is_small(width), quality=82, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
    return Sheet(uri, width, height, columns)


def decoded(frames: Array | Sequence[bytes]) -> Array:
    """Frames as uint8 ``[F, 3, H, W]``: an array as it is, encoded pictures read.

    Raises:
        ValueError: an array of another type or shape, or pictures of several sizes.
    """
    if not isinstance(frames, np.ndarray):
        pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in frames]
        frames = np.moveaxis(np.stack(pictures), -1, 1)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 [F, 3, H, W], got {frames.dtype} {list(frames.shape)}")
    return frames


def is_small(width: int) -> bool:
    """Whether frames of this width are kept without loss and enlarged."""
    return width <= SMALL


def thinned(count: int) -> Array:
    """Indices of at most ``MAX_FRAMES`` of ``count`` frames, evenly spaced, first and last included."""
    return np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int)


def scaled(frame: Array) -> Array:
    """A frame uint8 ``[3, H, W]``, of at most ``MAX_WIDTH`` pixels width."""
    return np.moveaxis(np.asarray(_image(frame)), -1, 0)


def _image(frame: Array) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    return image
