"""Clips and filmstrips as data URIs: small enough for one file, playing in any browser without a network."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
MAX_WIDTH = 320
MAX_FRAMES = 33
STRIP_FRAMES = 5
HOLD_MS = 700


def looping_clip(video: Array, fps: float = 4.0) -> str:
    """Encode uint8 [F, 3, H, W] as an animated WebP that loops for ever and rests a moment on its last frame."""
    frames = [_image(frame) for frame in _thin(video, MAX_FRAMES)]
    times = [round(1000 / fps)] * len(frames)
    times[-1] = max(times[-1], HOLD_MS)
    data = io.BytesIO()
    frames[0].save(
        data, format="WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=88, method=4
    )
    return _data_uri("image/webp", data.getvalue())


def filmstrip(video: Array, count: int = STRIP_FRAMES) -> str:
    """Encode evenly spaced frames of uint8 [F, 3, H, W] side by side as one WebP picture."""
    frames = [np.asarray(_image(frame)) for frame in _thin(video, count)]
    gap = np.full((frames[0].shape[0], 1, 3), 128, np.uint8)
    joined = np.concatenate([part for frame in frames for part in (gap, frame)][1:], axis=1)
    data = io.BytesIO()
    Image.fromarray(joined).save(data, format="WEBP", quality=90, method=4)
    return _data_uri("image/webp", data.getvalue())


def _thin(video: Array, count: int) -> Array:
    """Keep at most ``count`` frames, evenly spaced, first and last included."""
    if len(video) <= count:
        return video
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def _image(frame: Array) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    return image


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
