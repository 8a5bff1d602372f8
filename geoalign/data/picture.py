"""From decoded frames to the pixels that a player shows: colours, rotation and pixel shape; what it cannot show right
is refused, what it leaves as it is gets a remark."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoalign.data.container import Film, Tags
from geoalign.data.frames import cover_crop, stretch
from geoalign.errors import DataError

_RGB, _BT709, _UNKNOWN = 0, 1, (2, 3)
_MATRICES = {_BT709: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # FFmpeg's code -> that of its scaler
_BT601 = frozenset({5, 6})
_FULL_RANGE = 2
_WIDE_PRIMARIES = 9  # BT.2020
_NO_DISPLAY = {8: "linear", 9: "logarithmic", 10: "logarithmic", 16: "PQ (HDR10)", 17: "SMPTE 428", 18: "HLG"}
_HD_SHORT, _HD_LONG = 720, 1280

INTERLACED = "interlaced, its two fields are shown as one picture"
ALPHA = "transparent, its alpha channel is ignored"
WIDE = "BT.2020 primaries, its colours are read as those of BT.709"


@dataclass(frozen=True, slots=True)
class Turn:
    """A display matrix of right angles: swap the axes, then mirror rows and columns."""

    swap: bool = False
    rows: bool = False
    columns: bool = False

    def __call__(self, frames: Tensor) -> Tensor:
        """Turn ``[..., H, W]``."""
        if self.swap:
            frames = frames.transpose(-1, -2)
        mirrored = [axis for axis, wanted in ((-2, self.rows), (-1, self.columns)) if wanted]
        return frames.flip(mirrored) if mirrored else frames

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after (or, as the swap is its own inverse, before) the turn."""
        return (width, height) if self.swap else (height, width)


@dataclass(frozen=True, slots=True)
class Look:
    """How the frames of one film are shown.

    Attributes:
        stored: height and width of a decoded frame.
        turn: the display matrix.
        height, width: as shown: turned, and stretched to square pixels.
        matrix: code of the YUV matrix that is in force.
        assumed: what FFmpeg must be told because the frames do not say it: matrix, full range.
        remarks: what is read although a player could show it better.
    """

    stored: tuple[int, int]
    turn: Turn
    height: int
    width: int
    matrix: int
    assumed: tuple[int | None, int | None]
    remarks: tuple[str, ...]

    def pixels(self, path: Path, frame: Any, size: tuple[int, int] | None) -> Tensor:
        """uint8 RGB ``[3, H, W]`` as shown, or scaled to cover ``size = (H, W)`` and cut in the centre.

        Raises:
            DataError: the frame has another size than the first one.
        """
        if (frame.height, frame.width) != self.stored:
            raise DataError(
                f"{path}: the picture changes its size from {self.stored[1]} x {self.stored[0]} to "
                f"{frame.width} x {frame.height}; cut the file there"
            )
        matrix, full = self.assumed
        rgb = frame.to_ndarray(format="rgb24", src_colorspace=matrix, src_color_range=full)
        picture = self.turn(torch.from_numpy(rgb).permute(2, 0, 1)[None])
        shown = (self.height, self.width)
        return (stretch(picture, shown) if size is None else cover_crop(picture, size, shown))[0]

    @property
    def is_bt709(self) -> bool:
        """Whether RGB comes from the BT.709 matrix."""
        return self.matrix == _BT709

    @property
    def is_bt601(self) -> bool:
        """Whether RGB comes from the BT.601 matrix, or is stored as it is."""
        return self.matrix in _BT601 or self.matrix == _RGB


def look_of(path: Path, film: Film, frame: Any) -> Look:
    """How the film is shown, judged by its first frame.

    Raises:
        DataError: a transfer curve, matrix or rotation that cannot be shown right; the message says what to do.
    """
    tags, stored = film.tags, (frame.height, frame.width)
    _check_transfer(path, tags, frame)
    matrix, assumed = _matrix(path, tags, frame)
    full = _FULL_RANGE if not frame.color_range and tags.range == _FULL_RANGE else None
    turn = _turn(path, frame)
    height, width = turn.size(*square_pixels(*stored, tags.aspect))
    has_alpha = tags.alpha or any(component.is_alpha for component in frame.format.components)
    remarks = {
        INTERLACED: tags.interlaced or frame.interlaced_frame,
        ALPHA: has_alpha,
        WIDE: _WIDE_PRIMARIES in (frame.color_primaries, tags.primaries),
    }
    told = tuple(remark for remark, holds in remarks.items() if holds)
    return Look(stored, turn, height, width, matrix, (assumed, full), told)


def square_pixels(height: int, width: int, aspect: Fraction) -> tuple[int, int]:
    """Height and width after giving pixels of shape ``aspect`` (width / height) the shape 1: one side grows."""
    if aspect <= 0:
        return height, width
    return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def _check_transfer(path: Path, tags: Tags, frame: Any) -> None:
    transfer = frame.color_trc if frame.color_trc not in _UNKNOWN else tags.transfer
    name = _NO_DISPLAY.get(transfer)
    if name is None and transfer in _UNKNOWN and any(data.type.name.startswith("DOVI") for data in frame.side_data):
        name = "Dolby Vision"
    if name is not None:
        raise DataError(
            f"{path}: {name} video would be read flat; convert it to SDR first, e.g. ffmpeg -i IN -vf "
            "zscale=t=linear:npl=203,tonemap=mobius,zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p OUT"
        )


def _matrix(path: Path, tags: Tags, frame: Any) -> tuple[int, int | None]:
    """The matrix in force, and the scaler's code for it if the frame itself does not carry it."""
    if frame.format.is_rgb or frame.format.name.startswith("gray"):
        return _RGB, None
    if frame.colorspace in _MATRICES:
        return frame.colorspace, None
    if frame.colorspace in _UNKNOWN:
        if tags.matrix in _MATRICES:
            return tags.matrix, _MATRICES[tags.matrix]
        short, long = sorted((frame.height, frame.width))
        return (_BT709, _BT709) if short >= _HD_SHORT or long >= _HD_LONG else (5, None)
    raise DataError(f"{path}: colour matrix {frame.colorspace} (ITU-T H.273) is not supported; re-encode it as BT.709")


def _turn(path: Path, frame: Any) -> Turn:
    """The display matrix of a frame: ``x' = a x + c y``, ``y' = b x + d y`` with y downwards."""
    found = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not found:
        return Turn()
    a, b, _, c, d, *_ = np.frombuffer(found[0], np.int32)[:9].astype(np.float64)
    scale = max(abs(a), abs(b), abs(c), abs(d))
    if not scale:
        return Turn()
    a, b, c, d = (round(value / scale, 1) for value in (a, b, c, d))
    upright, turned = abs(a) == abs(d) == 1, abs(b) == abs(c) == 1
    if upright and not b and not c:
        return Turn(False, d < 0, a < 0)
    if turned and not a and not d:
        return Turn(True, b < 0, c < 0)
    raise DataError(f"{path}: turned by an angle that is no multiple of 90 degrees; re-encode it upright")
