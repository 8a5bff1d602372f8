"""What a user says of a camera file that the file itself does not: ``FILE#CAMERA:axes=opengl:unit=cm``.

The part behind ``#`` is split at ``:``; a piece with ``=`` is an option, the others are the camera's name. This one way
holds wherever a camera is named: options of the verbs, the camera column of a table, ``data.trajectories.path``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from geoalign.errors import UsageError

Axes = Literal["opencv", "opengl"]
Direction = Literal["c2w", "w2c"]
Fit = Literal["crop", "pad", "stretch", "source"]

MAX_SIDE = 1 << 16
"""Pixels: no video is larger, and a product of two sides fits an int64 by far."""

_METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001, "none": None}
_CHOICES = {"axes": get_args(Axes), "direction": get_args(Direction), "unit": tuple(_METRES), "fit": get_args(Fit)}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of length that was asked for; ``metres`` is None for ``unit=none``: the lengths are scale-free."""

    metres: float | None


@dataclass(frozen=True, slots=True)
class CameraOptions:
    """Options of a camera's name, None where they are left to the file and the default of its format.

    Attributes:
        axes: of the camera: ``opencv`` (x right, y down, z forward) or ``opengl`` (x right, y up, z backward).
        direction: of the matrices: ``c2w`` or ``w2c``.
        unit: of lengths.
        size: (H, W) of the frames that the intrinsics belong to, or "video": those of the video.
        fit: how frames of ``size`` were made from a video of another shape: scaled to cover it and cut in the centre
            (``crop``), scaled into it and padded on both sides (``pad``), or ``stretch``; or ``source``: the video was
            made from them, scaled to cover its size and cut in the centre.
    """

    axes: Axes | None = None
    direction: Direction | None = None
    unit: Unit | None = None
    size: tuple[int, int] | Literal["video"] | None = None
    fit: Fit | None = None

    def about_poses(self) -> dict[str, Any]:
        """The options on poses that were given, with values as :class:`Poses` has them."""
        given = {"axes": self.axes, "direction": self.direction}
        unit = {} if self.unit is None else {"unit": self.unit.metres}
        return {key: value for key, value in given.items() if value is not None} | unit

    def text(self, key: str) -> str:
        """The option ``key`` as it is typed."""
        value = getattr(self, key)
        if isinstance(value, Unit):
            return next(name for name, metres in _METRES.items() if value.metres == metres)
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_choice(text: str) -> tuple[str, CameraOptions]:
    """The camera's name ("" if none) and the options in what stands behind ``#``; raises UsageError."""
    names, options = [], {}
    for piece in text.split(":") if text else []:
        key, mark, value = piece.partition("=")
        if not mark:
            names.append(piece)
        elif key in options:
            raise UsageError(f"#{text}: {key} is given twice")
        else:
            options[key] = _value(text, key, value)
    return ":".join(names), CameraOptions(**options)


def _value(text: str, key: str, value: str) -> Any:
    if key == "size":
        return value if value == "video" else _size(text, value)
    if key not in _CHOICES:
        raise UsageError(f"#{text}: no option {key!r}; known: {', '.join((*_CHOICES, 'size'))}")
    if value not in _CHOICES[key]:
        raise UsageError(f"#{text}: {key} is one of {', '.join(_CHOICES[key])}, got {value!r}")
    return Unit(_METRES[value]) if key == "unit" else value


def _size(text: str, value: str) -> tuple[int, int]:
    height, mark, width = value.lower().partition("x")
    if not (mark and height.isdecimal() and width.isdecimal()):
        raise UsageError(f"#{text}: size is HEIGHTxWIDTH in pixels, as in size=1080x1920, or video; got {value!r}")
    size = int(height[:9]), int(width[:9])
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise UsageError(f"#{text}: the sides of size={value} must be 1 to {MAX_SIDE} pixels")
    return size
