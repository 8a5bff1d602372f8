"""NVIDIA DALI reader: decode, resize and crop on the GPU (NVDEC), or on the CPU for VP8, VP9 and MJPEG.

Bytes and frame numbers come from Python for every call (external source), so that the stateless sampler stays in
charge; DALI's own readers cannot draw a random start inside a file and split file lists at spaces. Frame indices equal
those of the PyAV reader; colours differ by chroma interpolation and rounding (see docs/data.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoalign.data.video import PyAVReader, VideoInfo
from geoalign.errors import DataError, UsageError
from geoalign.geometry.lens import cover_size

_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
_PIPELINES_KEPT = 4


class DaliReader:
    """Decodes with ``fn.decoders.video``; implements :class:`geoalign.data.video.VideoReader`.

    Args:
        device_id: GPU index; None builds CPU pipelines, which support VP8, VP9 and MJPEG only.

    Raises:
        UsageError: DALI is not installed.
    """

    name = "dali"

    def __init__(self, device_id: int | None = None) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "reader=dali needs NVIDIA DALI: pip install 'geoalign[dali-cu13]' (or dali-cu12), or use reader=pyav"
            ) from error
        self._device_id = device_id
        self._prober = PyAVReader()
        self._pipeline = lru_cache(maxsize=_PIPELINES_KEPT)(self._build)

    def probe(self, path: Path) -> VideoInfo:
        """Container facts come from FFmpeg, so that both readers agree on the number of frames."""
        return self._prober.probe(path)

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`geoalign.data.video.VideoReader`; the result is on the CPU."""
        if not indices:
            raise UsageError(f"{path}: no frames asked for")
        info = self.probe(path)
        if min(indices) < 0 or max(indices) >= info.frames:
            raise DataError(f"{path}: frames {min(indices)}..{max(indices)} asked for, but it has {info.frames}")
        if self._device_id is None and info.codec not in _CPU_CODECS:
            raise DataError(f"{path}: DALI decodes {info.codec} on a GPU only; use reader=pyav or re-encode to VP9")
        scaled = None if size is None else cover_size(info.height, info.width, size)
        pipeline = self._pipeline(scaled, size)
        try:
            pipeline.feed_input("encoded", [np.fromfile(path, dtype=np.uint8)])
            pipeline.feed_input("frames", [np.asarray(indices, dtype=np.int32)])
            (output,) = pipeline.run()
            frames = torch.from_dlpack(output[0]).cpu().clone()
        except (RuntimeError, OSError, ValueError) as error:
            # A failed sample leaves the pipeline unusable: drop it, the next call builds a fresh one.
            self._pipeline.cache_clear()
            reason = str(error).strip().splitlines()
            raise DataError(f"{path}: DALI cannot decode it ({reason[0] if reason else error!r})") from error
        if len(frames) != len(indices):
            raise DataError(f"{path}: DALI returned {len(frames)} of {len(indices)} frames")
        return frames

    def _build(self, scaled: tuple[int, int] | None, size: tuple[int, int] | None) -> Any:
        """A one-sample pipeline: decode, resize to ``scaled``, cut the centre ``size``; uint8 ``[F, 3, H, W]``."""
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            device = "cpu" if self._device_id is None else "mixed"
            video = fn.decoders.video(encoded, frames=frames, device=device, pad_mode="none")
            if scaled is not None and size is not None:
                video = fn.resize(video, size=scaled, interp_type=types.INTERP_LINEAR, antialias=True)
                top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
                video = fn.slice(video, (top, left), size, axis_names="HW")
            pipeline.set_outputs(fn.transpose(video, perm=(0, 3, 1, 2)))
        pipeline.build()
        return pipeline
