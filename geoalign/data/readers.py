"""Opening readers by name; folders of images are read like videos."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from geoalign.data.clips import is_frame, natural_key
from geoalign.data.frames import cover_crop
from geoalign.data.picture import ALPHA
from geoalign.data.video import PyAVReader, VideoInfo, VideoReader, check_indices
from geoalign.errors import DataError, UsageError

READER_VERSION = 2
"""Part of the settings of prepared caches: raised whenever a reader gives other pixels or other frames of some file."""
_FRAME_FPS = 24.0  # image folders do not say; DAVIS is 24
_NUMBER = re.compile(r"[0-9]+")


class FrameFolderReader:
    """Reads a folder of images in natural order (``2.jpg`` before ``10.jpg``) as a video.

    Hidden files are no frames. Names must differ in their numbers only: a mask or a thumbnail beside the frames is
    refused, because nothing tells which of them are the film.
    """

    name = "frames"

    def probe(self, path: Path) -> VideoInfo:
        """See :class:`VideoReader`; size and transparency are those of the first image."""
        files = self._files(path)
        height, width = _read_image(files[0]).shape[-2:]
        remarks = [f"frame numbers missing, {missing} of them"] if (missing := _missing(files)) else []
        remarks += [ALPHA] if _has_alpha(files[0]) else []
        codec = files[0].suffix.lower().lstrip(".")
        return VideoInfo(len(files), height, width, _FRAME_FPS, True, codec, tuple(remarks))

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`VideoReader`."""
        files = self._files(path)
        check_indices(path, indices, len(files))
        pictures = {}
        for index in sorted(set(indices)):
            picture = _read_image(files[index])[None]
            pictures[index] = (picture if size is None else cover_crop(picture, size))[0]
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise DataError(f"{path}: images of different sizes")
        return torch.stack([pictures[index] for index in indices])

    @staticmethod
    def _files(path: Path) -> list[Path]:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder of frames")
        files = [file for file in path.iterdir() if is_frame(file)]
        if not files:
            raise DataError(f"{path}: no images")
        patterns = {_NUMBER.sub("#", file.name.lower()): file.name for file in sorted(files)}
        if len(patterns) > 1 and any("#" in pattern for pattern in patterns):
            names = ", ".join(list(patterns.values())[:3])
            raise DataError(f"{path}: images of several kinds ({names}); leave only the frames of one film there")
        return sorted(files, key=lambda file: natural_key(file.name))


def _missing(files: Sequence[Path]) -> int:
    """How many frames are missing between the first and the last, going by the last number in their names.

    Most numbers must be one common step apart; times of day, for example, are no numbering.
    """
    found = [_NUMBER.findall(file.stem) for file in files]
    numbers = sorted({int(groups[-1]) for groups in found if groups})
    steps = Counter(later - earlier for earlier, later in pairwise(numbers))
    step, often = steps.most_common(1)[0] if steps else (0, 0)
    if len(numbers) < len(files) or 2 * often < len(numbers) - 1 or not step:
        return 0
    return sum((gap // step - 1) * times for gap, times in steps.items() if gap > step)


def _has_alpha(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.has_transparency_data
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error})") from error


def _read_image(path: Path) -> Tensor:
    """uint8 ``[3, H, W]`` RGB."""
    import cv2
    import numpy as np

    try:
        encoded = np.fromfile(path, dtype=np.uint8)
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    except (OSError, cv2.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if picture is None:
        raise DataError(f"{path}: not a readable image")
    return torch.from_numpy(picture).permute(2, 0, 1)


class AnyReader:
    """Image folders through :class:`FrameFolderReader`, files through the given reader."""

    def __init__(self, files: VideoReader) -> None:
        self._files, self._folders = files, FrameFolderReader()
        self.name = files.name

    def probe(self, path: Path) -> VideoInfo:
        """See :class:`VideoReader`."""
        return (self._folders if path.is_dir() else self._files).probe(path)

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`VideoReader`."""
        return (self._folders if path.is_dir() else self._files).read(path, indices, size)


def local_device() -> int | None:
    """The GPU that this process decodes on (its current CUDA device), or None without one."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def open_reader(name: str, device_id: int | None = None) -> VideoReader:
    """The reader called ``name`` ("pyav" or "dali"), for files and image folders alike.

    Args:
        name: reader name.
        device_id: GPU of the DALI reader; None decodes on the CPU (VP8, VP9 and MJPEG only).
    """
    if name == "dali":
        from geoalign.data.dali import DaliReader

        return AnyReader(DaliReader(device_id))
    if name != "pyav":
        raise UsageError(f"unknown video reader '{name}'; known: pyav, dali")
    return AnyReader(PyAVReader())


def shown_size(path: Path) -> tuple[int, int]:
    """(H, W) of a video or a folder of pictures as shown; raises DataError if it cannot be read."""
    info = AnyReader(PyAVReader()).probe(path)
    return info.height, info.width
