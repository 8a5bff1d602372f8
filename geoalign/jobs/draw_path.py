"""From a video to the page on which its retake's camera path is drawn."""

from __future__ import annotations

from pathlib import Path

import torch

from geoalign.config.data import RescaleConfig, TruncatedGaussian
from geoalign.data.readers import AnyReader
from geoalign.data.video import PyAVReader, probe_clip, warn_once
from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_write_text
from geoalign.geometry.cameras.door import camera_beside
from geoalign.geometry.presets import PRESETS, preset
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS
from geoalign.report.media import MAX_WIDTH
from geoalign.report.path_page import PathDrawing, SpeedBand, path_page

MOST_FRAMES = 81


def write_path_page(video: Path, out: Path, law: RescaleConfig, frames: int | None = None) -> Path:
    """Write the page for ``video``, a file or a folder of frames; returns ``out``.

    Args:
        law: speeds that training drew, and the frame rate that they are meant at.
        frames: length of the path; default: the video's, at most 81.

    Raises:
        UsageError: ``frames`` below 2, or more than the video has.
        DataError: the video or the camera file beside it cannot be read, or the video has no second frame.
    """
    reader = AnyReader(PyAVReader())
    info = probe_clip(reader, video)
    warn_once(video, info.remarks)
    if info.frames < 2:
        raise DataError(f"{video}: {info.frames} frame, and a path needs 2 or more")
    count = min(info.frames, MOST_FRAMES) if frames is None else frames
    if not 2 <= count <= info.frames:
        raise UsageError(f"--frames {count}: {video} has {info.frames} frames, and a path needs 2 or more")
    size = (info.height, info.width)
    shown = size if info.width <= MAX_WIDTH else (max(round(info.height * MAX_WIDTH / info.width), 1), MAX_WIDTH)
    pixels = reader.read(video, range(count), shown)  # scaled one by one: 81 frames of 4K are 2 GB
    lens, plane = torch.tensor(DEFAULT_INTRINSICS, dtype=torch.float64), None
    if (beside := camera_beside(video, lambda _: size)) is not None:
        lens = beside.path.intrinsics[0] if beside.has_lens else lens
        plane = beside.window(range(1))[1] if beside.metric else None
    drawing = PathDrawing(
        name=video.name,
        video=pixels.numpy(),
        size=size,
        intrinsics=lens.double().numpy(),
        plane=None if plane is None else plane.numpy(),
        presets={name: preset(name, count, dtype=torch.float64).c2w.numpy() for name in PRESETS},
        fps=law.play_fps,
        metres_per_s=_band(law.translation),
        degrees_per_s=_band(law.rotation),
        most_path_m=law.max_path_m,
        most_yaw_deg=law.max_yaw_deg,
    )
    atomic_write_text(out, path_page(drawing))
    return out


def _band(gaussian: TruncatedGaussian) -> SpeedBand:
    return SpeedBand(gaussian.mean, gaussian.low, gaussian.high)
