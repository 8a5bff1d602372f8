"""Opening readers by name; folders of images are read like videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from geoalign.data.clips import IMAGE_SUFFIXES, natural_key
from geoalign.data.frames import cover_crop
from geoalign.data.video import PyAVReader, VideoInfo, VideoReader
from geoalign.errors import DataError, UsageError

_FRAME_FPS = 24.0  # image folders do not say; DAVIS is 24


class FrameFolderReader:
    """Reads a folder of images in natural order (``2.jpg`` before ``10.jpg``) as a video."""

    name = "frames"

    def probe(self, path: Path) -> VideoInfo:
        """See :class:`VideoReader`; the size is that of the first image."""
        files = self._files(path)
        height, width = _read_image(files[0]).shape[-2:]
        return VideoInfo(len(files), height, width, _FRAME_FPS, True, files[0].suffix.lower().lstrip("."))

    def read(self, path: Path, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`VideoReader`."""
        files = self._files(path)
        if not indices:
            raise UsageError(f"{path}: no frames asked for")
        if min(indices) < 0 or max(indices) >= len(files):
            raise DataError(f"{path}: frames {min(indices)}..{max(indices)} asked for, but it has {len(files)}")
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
        files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise DataError(f"{path}: no images")
        return sorted(files, key=lambda file: natural_key(file.name))


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
