"""NVIDIA DALI reader: decode, resize and crop on the GPU (NVDEC), or on the CPU for VP8, VP9 and MJPEG.

Bytes and frame numbers come from Python for every call (external source), so that the stateless sampler stays in
charge; DALI's own readers cannot draw a random start inside a file and split file lists at spaces. Frame indices equal
those of the PyAV reader; colours differ by chroma interpolation and rounding (see docs/data.md). DALI knows neither
display matrices nor pixel shapes, edit lists nor colour matrices: what is not made good here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoalign.data.frames import centre_crop
from geoalign.data.picture import INTERLACED, Look
from geoalign.data.timeline import Timeline
from geoalign.data.video import PyAVReader, VideoInfo, check_indices
from geoalign.errors import DataError, UsageError
from geoalign.geometry.lens import cover_size
from geoalign.install import install

CLIPPED = "BT.709 through DALI, saturated colours differ from PyAV's by up to 38 of 255 levels"
_ELSEWHERE = "use data.clips.reader=pyav"
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
                f"reader=dali needs NVIDIA DALI: {install('dali-cu13')} (or dali-cu12), or use reader=pyav"
            ) from error
        self._device_id = device_id
        self._prober = PyAVReader()
        self._pipeline = lru_cache(maxsize=_PIPELINES_KEPT)(self._build)

    def probe(self, path: Path) -> VideoInfo:
        """Container facts come from FFmpeg, so that both readers agree on the number of frames; what DALI cannot show
        is refused here already."""
        timeline = self._prober.timeline(path)
        self._check(path, timeline)
        info = self._prober.probe(path)
        return replace(info, remarks=(*info.remarks, CLIPPED)) if timeline.look.is_bt709 else info

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`geoalign.data.video.VideoReader`; the result is on the CPU."""
        timeline = self._prober.timeline(path)
        check_indices(path, indices, timeline.frames)
        self._check(path, timeline)
        look = timeline.look
        shown = (look.height, look.width)
        scaled = shown if size is None else cover_size(*shown, size)
        before = look.turn.size(*scaled)
        pipeline = self._pipeline(None if before == look.stored else before)
        try:
            pipeline.feed_input("encoded", [np.fromfile(path, dtype=np.uint8)])
            pipeline.feed_input("frames", [np.asarray(indices, dtype=np.int32)])
            (output,) = pipeline.run()
            frames = look.turn(torch.from_dlpack(output[0]))
            frames = _shown(frames if size is None else centre_crop(frames, size), look)
        except (RuntimeError, OSError, ValueError) as error:
            # A failed sample leaves the pipeline unusable: drop it, the next call builds a fresh one.
            self._pipeline.cache_clear()
            reason = str(error).strip().splitlines()
            raise DataError(f"{path}: DALI cannot decode it ({reason[0] if reason else error!r})") from error
        if len(frames) != len(indices):
            raise DataError(f"{path}: DALI returned {len(frames)} of {len(indices)} frames")
        return frames

    def _check(self, path: Path, timeline: Timeline) -> None:
        """Raise DataError for a film that DALI would not show as a player does."""
        codec, look = timeline.codec, timeline.look
        if self._device_id is None and codec not in _CPU_CODECS:
            raise DataError(f"{path}: DALI decodes {codec} on a GPU only; {_ELSEWHERE} or re-encode to VP9")
        if timeline.tracks > 1:
            raise DataError(f"{path}: {timeline.tracks} video tracks, of which DALI cannot choose one; {_ELSEWHERE}")
        if timeline.stamps is None or not timeline.whole:
            raise DataError(
                f"{path}: hidden frames or time stamps that do not tell the order of frames; {_ELSEWHERE}, or re-encode"
            )
        if INTERLACED in look.remarks:
            raise DataError(f"{path}: interlaced, which DALI may mix otherwise than PyAV; {_ELSEWHERE}")
        if not (look.is_bt601 or look.is_bt709):
            raise DataError(f"{path}: colour matrix {look.matrix} (ITU-T H.273), DALI knows none of it; {_ELSEWHERE}")

    def _build(self, scaled: tuple[int, int] | None) -> Any:
        """A one-sample pipeline: decode and resize to ``scaled``; uint8 ``[F, 3, H, W]``."""
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            device = "cpu" if self._device_id is None else "mixed"
            video = fn.decoders.video(encoded, frames=frames, device=device, pad_mode="none")
            if scaled is not None:
                video = fn.resize(video, size=scaled, interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(fn.transpose(video, perm=(0, 3, 1, 2)))
        pipeline.build()
        return pipeline


def _shown(frames: Tensor, look: Look) -> Tensor:
    """DALI's frames ``[F, 3, H, W]``, which it always takes for BT.601, in their own matrix and on the CPU.

    What left [0, 255] in DALI's RGB is lost: up to 38 levels (magenta), none between 32 and 223 in all channels.
    """
    if not look.is_bt709:
        return frames.cpu().clone()
    matrix = _BT601_TO_BT709.to(frames.device)
    out = torch.empty(frames.shape, dtype=torch.uint8)
    for target, frame in zip(out, frames, strict=True):  # one by one: float copies of all would be large
        target.copy_(torch.einsum("ij,jhw->ihw", matrix, frame.float()).round_().clamp_(0, 255))
    return out


def _from_yuv(red: float, blue: float) -> Tensor:
    """Float64 ``[3, 3]`` from (Y, Cb, Cr) in [0, 1] and [-0.5, 0.5] to RGB, by the weights of red and blue in Y."""
    green = 1 - red - blue
    to_yuv = torch.tensor([[red, green, blue], [-red, -green, 1 - blue], [1 - red, -green, -blue]], dtype=torch.float64)
    to_yuv[1] /= 2 * (1 - blue)
    to_yuv[2] /= 2 * (1 - red)
    return torch.linalg.inv(to_yuv)


_BT601_TO_BT709 = (_from_yuv(0.2126, 0.0722) @ torch.linalg.inv(_from_yuv(0.299, 0.114))).float()
