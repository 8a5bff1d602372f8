"""``transforms.json`` of nerfstudio and instant-ngp: OpenGL axes, no unit, frames in any order, lenses with distortion.

Source: docs.nerf.studio/quickstart/data_conventions.html.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from geoalign.geometry.cameras.content import Content
from geoalign.geometry.cameras.options import MAX_SIDE
from geoalign.geometry.cameras.poses import Poses

_PINHOLES = frozenset({"OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL"})
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_BENT = 0.01  # of the frame's width, at its corner: below it a pinhole is as good as the estimate of the lens


def is_nerfstudio(content: Content) -> bool:
    """An object with a list ``frames`` of objects with ``transform_matrix``."""
    frames = content.data.get("frames") if isinstance(content.data, dict) else None
    return isinstance(frames, list) and bool(frames) and all(_is_frame(frame) for frame in frames)


def read_nerfstudio(content: Content, camera: str) -> Poses:
    """Camera-to-world by the format's rule; frames in the order of the numbers in their names, none of them missing."""
    frames = _in_order(content, content.data["frames"])
    matrices = np.stack(
        [content.array("transform_matrix", (4, 4), (3, 4), value=frame["transform_matrix"])[:3] for frame in frames]
    )
    sizes = {(_whole(content, frame, "h"), _whole(content, frame, "w")) for frame in frames}
    if len(sizes) > 1:
        raise content.error(f"frames of several sizes (h, w): {sorted(map(str, sizes))[:3]}")
    height, width = sizes.pop()
    size = None if height is None or width is None else (height, width)
    rows = [_lens(content, frame, size) for frame in frames]
    lens = None if None in rows else np.array(rows)
    if lens is None and any(row is not None for row in rows):
        raise content.error("some frames have a focal length and others none")
    return Poses(
        matrices, axes="opengl", unit=None, stated=frozenset({"direction"}), lens=lens, lens_unit="pixels",
        frame_size=size,
    )  # fmt: skip


def _is_frame(frame: Any) -> bool:
    return isinstance(frame, dict) and "transform_matrix" in frame


def _in_order(content: Content, frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each frame over the file's common values, by the last number in its ``file_path``; without numbers as listed."""
    common = {key: value for key, value in content.data.items() if key != "frames"}
    numbers = [re.findall(r"[0-9]{1,18}", str(frame.get("file_path", "")).rpartition("/")[2]) for frame in frames]
    merged = [{**common, **frame} for frame in frames]
    if not all(numbers):
        return merged
    order = sorted(range(len(frames)), key=lambda index: int(numbers[index][-1]))
    sorted_numbers = [int(numbers[index][-1]) for index in order]
    steps = [later - earlier for earlier, later in pairwise(sorted_numbers)]
    if steps and (min(steps) != max(steps) or steps[0] == 0):
        place = next(i for i, step in enumerate(steps) if step != min(steps) or step == 0)
        raise content.error(
            f"frames {sorted_numbers[place]} and {sorted_numbers[place + 1]} are not one even step apart: poses are "
            "missing or twice there; cut the video there"
        )
    return [merged[index] for index in order]


def _lens(content: Content, frame: Mapping[str, Any], size: tuple[int, int] | None) -> list[float] | None:
    """fx, fy, cx, cy in pixels, or None if the file has no focal length."""
    _refuse_bent(content, frame, size)
    fx = _number(content, frame, "fl_x")
    if fx is None and (angle := _number(content, frame, "camera_angle_x")) is not None:
        half = math.tan(angle / 2) if 0 < angle < math.pi else 0.0  # 0 too where half the angle underflows
        if size is None or not half:
            raise content.error(f"camera_angle_x {angle:g} needs w and h, and lies between 0 and pi")
        fx = size[1] / (2 * half)
    if fx is None:
        return None
    fy = _number(content, frame, "fl_y")
    middle = (None, None) if size is None else (size[1] / 2, size[0] / 2)
    cx, cy = (
        value if (value := _number(content, frame, key)) is not None else half
        for key, half in zip(("cx", "cy"), middle, strict=True)
    )
    if cx is None or cy is None:
        raise content.error("a focal length without w and h, or cx and cy; write them")
    return [fx, fx if fy is None else fy, cx, cy]


def _refuse_bent(content: Content, frame: Mapping[str, Any], size: tuple[int, int] | None) -> None:
    """Refuse lenses that are no pinholes."""
    model, fisheye = frame.get("camera_model", "PINHOLE"), frame.get("is_fisheye", False)
    if not (isinstance(model, str) and model in _PINHOLES) or fisheye is not False:
        told = f"camera_model {model}" if fisheye is False else f"is_fisheye {fisheye}"
        raise content.error(f"{told} is no pinhole ({', '.join(sorted(_PINHOLES))}); undistort the video first")
    values = {key: _number(content, frame, key) or 0.0 for key in _DISTORTION}
    if not any(values.values()):
        return
    focal = _number(content, frame, "fl_x")
    if size is None or not focal:
        raise content.error("the lens is distorted (k1, ...); undistort the video first")
    x, y = size[1] / 2 / focal, size[0] / 2 / focal
    square = x * x + y * y
    powers = (values[key] * square ** (index + 1) for index, key in enumerate(_DISTORTION[:4]))
    bent = abs(sum(powers)) * x + 3 * square * (abs(values["p1"]) + abs(values["p2"]))
    if not bent * focal / size[1] < _BENT:
        raise content.error(
            f"the lens is distorted (k1, ...): corners lie {bent * focal / size[1]:.1%} of the width off a pinhole's; "
            "undistort the video first"
        )


def _number(content: Content, frame: Mapping[str, Any], key: str) -> float | None:
    if frame.get(key) is None:
        return None
    value = frame[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise content.error(f"{key} is {value!r}, not a number")
    return float(content.array(key, (), value=value))


def _whole(content: Content, frame: Mapping[str, Any], key: str) -> int | None:
    value = _number(content, frame, key)
    if value is not None and not (value.is_integer() and 1 <= value <= MAX_SIDE):
        raise content.error(f"{key} is {value:g}, not a number of pixels")
    return None if value is None else int(value)
