"""The formats of camera files, one entry each in ``FORMATS``: how a file is recognised, which cameras it holds, how one
is read.

A reader returns what the file says; axes, units and layouts of others are converted here, while validation and the
choice of the lens are the door's (:mod:`geoalign.geometry.cameras.door`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoalign.geometry.cameras.content import Content, read_content
from geoalign.geometry.presets import unreal_to_opencv

_C2W = ((None, 4, 4), (None, 3, 4))
_LENS = ((4,), (1, 4), (None, 4))


@dataclass(frozen=True, slots=True, eq=False)
class Poses:
    """What a file says of one camera.

    Attributes:
        c2w: ``[F, 3 or 4, 4]`` float64 camera-to-world, OpenCV axes.
        lens: ``[4]``, ``[1, 4]`` or ``[F, 4]`` fx, fy, cx, cy; None if the file has none.
        pixels: whether ``lens`` is in pixels of frames of ``frame_size``, and not fractions.
        frame_size: (H, W) of the frames that ``lens`` belongs to; None: those of the video.
        metric: whether lengths are metres.
        ground_plane: ``[4]`` (n, d) in the world frame of ``c2w``, or None.
    """

    c2w: NDArray[np.float64]
    lens: NDArray[np.float64] | None = None
    pixels: bool = False
    frame_size: tuple[int, int] | None = None
    metric: bool = True
    ground_plane: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class CameraFormat:
    """One format.

    Attributes:
        name: what it is called in messages.
        holds: what is in such a file, for the message that lists the formats.
        matches: whether a file is of this format.
        read: the camera of a file, by its name among ``cameras`` ("" where there is only one).
        cameras: names of the cameras of a file that holds several.
    """

    name: str
    holds: str
    matches: Callable[[Content], bool]
    read: Callable[[Content, str], Poses]
    cameras: Callable[[Content], tuple[str, ...]] = lambda content: ("",)


def _read_own(content: Content, camera: str) -> Poses:
    """The project's npz and the published Sekai npz; the published ones are scale-free and do not say ``metric``."""
    c2w = content.array("extrinsic", (None, 4, 4))
    matrices = np.broadcast_to(content.array("intrinsic", (3, 3), (1, 3, 3), (len(c2w), 3, 3)), (len(c2w), 3, 3))
    lens = np.stack([matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 0, 2], matrices[:, 1, 2]], axis=-1)
    size = _frame_size(content, content.array("image_size", (2,))) if content.has("image_size") else None
    metric = content.has("metric") and bool(content.array("metric", (), (1,)).all())
    return Poses(c2w, lens, True, size, metric, _plane(content))


def _read_c2w(content: Content, camera: str) -> Poses:
    if not isinstance(content.data, dict):
        return Poses(content.array("c2w", *_C2W, value=content.data))
    lens = content.array("intrinsics", *_LENS) if content.has("intrinsics") else None
    return Poses(content.array("c2w", *_C2W), lens)


def _read_sample(content: Content, camera: str) -> Poses:
    """The target is the camera of the retake, the source that of the video it was made from (both after its crop)."""
    used = content.data.get("used")
    size = used.get("size") if isinstance(used, dict) else None
    frame_size = None if size is None else _frame_size(content, content.array("used.size", (2,), value=size))
    lens = content.array("intrinsics", *_LENS) if content.has("intrinsics") else None
    plane = _plane(content) if content.data.get("ground_plane") is not None else None
    return Poses(content.array(f"{camera}_c2w", *_C2W), lens, False, frame_size, ground_plane=plane)


def _read_recammaster(content: Content, camera: str) -> Poses:
    """Row vectors, Unreal axes, centimetres; a left-handed world (absolute matrices are reflections), ``-0`` tokens,
    frames in any order."""
    rows = []
    for frame in range(len(content.data)):
        entry = content.data.get(f"frame{frame}")
        if not isinstance(entry, dict):
            raise content.error(f"frame{frame} is missing; {len(content.data)} consecutive frames were expected")
        if camera not in entry:
            raise content.error(f"frame{frame} has no camera {camera!r}; it has {', '.join(sorted(entry)[:12])}")
        rows.append(_parse_rows(content, f"frame{frame} {camera}", entry[camera]))
    matrices = np.stack(rows)
    if not np.isfinite(matrices).all():
        raise content.error(f"{camera}: NaN or infinite pose")
    return Poses(unreal_to_opencv(torch.from_numpy(matrices)).numpy())


def _parse_rows(content: Content, where: str, text: Any) -> NDArray[np.float64]:
    tokens = re.sub(r"[\[\],]", " ", str(text)).split()
    try:
        values = [float(token) for token in tokens]
    except ValueError as error:
        raise content.error(f"{where}: {error}") from error
    if len(values) != 16:
        raise content.error(f"{where}: 16 numbers expected, got {len(values)}")
    return np.array(values).reshape(4, 4)


def _recammaster_cameras(content: Content) -> tuple[str, ...]:
    first = content.data.get("frame0")
    if not isinstance(first, dict) or not first:
        raise content.error(f"frame0 is missing; {len(content.data)} consecutive frames were expected")
    return tuple(sorted(first))


def _read_vipe(content: Content, camera: str) -> Poses:
    """``pose/NAME.npz``, with intrinsics in pixels in ``../intrinsics/NAME.npz``; gaps in ``inds`` are lost frames."""
    c2w = content.array("data", *_C2W)
    inds = content.data.get("inds")
    if inds is not None and not np.array_equal(inds, np.arange(len(c2w))):
        raise content.error(f"ViPE lost frames: inds is not 0..{len(c2w) - 1}; cut the video there and run ViPE again")
    beside = content.path.parent.parent / "intrinsics" / content.path.name
    if not beside.is_file():
        return Poses(c2w)
    return Poses(c2w, read_content(beside).array("data", (len(c2w), 4)), pixels=True)


def _frame_size(content: Content, size: NDArray[np.float64]) -> tuple[int, int]:
    if not (np.isfinite(size).all() and (size >= 1).all()):
        raise content.error(f"the frame size {size.tolist()} is not a positive (H, W)")
    return int(size[0]), int(size[1])


def _plane(content: Content) -> NDArray[np.float64] | None:
    """``ground_plane`` with a unit normal: the distance would be read in another unit otherwise."""
    if not content.has("ground_plane"):
        return None
    plane = content.array("ground_plane", (4,), (1, 4)).reshape(4)
    if not abs(np.linalg.norm(plane[:3]) - 1) < 1e-3 or not np.isfinite(plane).all():
        raise content.error(f"ground_plane {plane.tolist()} must be (n, d) with |n| = 1; divide it by |n|")
    return plane


def _is_c2w(content: Content) -> bool:
    return content.has("c2w") or isinstance(content.data, np.ndarray | list)


def _is_recammaster(content: Content) -> bool:
    return isinstance(content.data, dict) and any(re.fullmatch(r"frame\d+", str(key)) for key in content.data)


def _is_vipe(content: Content) -> bool:
    return content.has("data") and isinstance(content.data["data"], np.ndarray)


FORMATS = (
    CameraFormat("c2w", "npy, npz or JSON with c2w [F, 4, 4]", _is_c2w, _read_c2w),
    CameraFormat("geoalign npz", "npz with extrinsic and intrinsic", lambda c: c.has("extrinsic"), _read_own),
    CameraFormat(
        "geoalign sample JSON", "the JSON that `geoalign sample` writes", lambda c: c.has("target_c2w", "source_c2w"),
        _read_sample, lambda content: ("source", "target"),
    ),
    CameraFormat(
        "ReCamMaster JSON", "camera_extrinsics.json of ReCamMaster or MultiCamVideo", _is_recammaster,
        _read_recammaster, _recammaster_cameras,
    ),
    CameraFormat("ViPE npz", "pose/NAME.npz of ViPE", _is_vipe, _read_vipe),
)  # fmt: skip
"""Every format that the door knows; the first that matches reads the file."""
