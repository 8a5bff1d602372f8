"""The formats of camera files, one entry each in ``FORMATS``: how a file is recognised, which cameras it holds, how one
is read.

A reader returns what the file says, with the default of its format for what it does not say; conversion and validation
are those of :mod:`geoalign.geometry.cameras.poses`, the choice of the lens that of
:mod:`geoalign.geometry.cameras.file_lens`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoalign.geometry.cameras.content import Content, read_content
from geoalign.geometry.cameras.nerfstudio import is_nerfstudio, read_nerfstudio
from geoalign.geometry.cameras.options import MAX_SIDE
from geoalign.geometry.cameras.poses import MATRICES, POSES, CameraFormat, Poses
from geoalign.geometry.cameras.text_formats import is_kitti, is_re10k, is_tum, read_kitti, read_re10k, read_tum
from geoalign.geometry.presets import unreal_to_opencv
from geoalign.geometry.trajectory import LARGEST

_LENS = ((4,), (1, 4), (None, 4), (3, 3), (1, 3, 3), (None, 3, 3))


def _read_own(content: Content, camera: str) -> Poses:
    """The project's npz and the published Sekai npz; the published ones are scale-free and do not say ``metric``."""
    matrices = content.array("extrinsic", (None, 4, 4))
    lens = content.array("intrinsic", (3, 3), (1, 3, 3), (len(matrices), 3, 3))
    size = _frame_size(content, content.array("image_size", (2,))) if content.has("image_size") else None
    metric = content.has("metric") and _flag(content, "metric")
    return Poses(
        matrices, unit=1.0 if metric else None, stated=frozenset({"unit"} if content.has("metric") else ()), lens=lens,
        lens_unit="unknown" if size is None else "pixels", frame_size=size, ground_plane=_plane(content),
    )  # fmt: skip


def _read_vggt(content: Content, camera: str) -> Poses:
    """World-to-camera ``[F, 3, 4]`` without a unit, pixels of the network's input, whose middle is the principal point;
    a leading axis of the batch is dropped."""
    matrices = content.array("extrinsic", (None, 3, 4), (1, None, 3, 4))
    matrices = matrices.reshape(-1, 3, 4)
    count = len(matrices)
    lens = content.array("intrinsic", (3, 3), (1, 3, 3), (count, 3, 3), (1, count, 3, 3))
    return Poses(matrices, "w2c", unit=None, lens=lens.reshape(-1, 3, 3), lens_unit="unknown", centred=True)


def _read_c2w(content: Content, camera: str) -> Poses:
    if not isinstance(content.data, dict):
        return Poses(content.array("c2w", *MATRICES, value=content.data))
    lens = content.array("intrinsics", *_LENS) if content.has("intrinsics") else None
    size = _frame_size(content, content.array("image_size", (2,))) if content.has("image_size") else None
    return Poses(
        content.array("c2w", *MATRICES), stated=frozenset({"direction"}), lens=lens, lens_unit="unknown",
        frame_size=size,
    )  # fmt: skip


def _read_sample(content: Content, camera: str) -> Poses:
    """The target is the camera of the retake, the source that of the video it was made from (both after its crop)."""
    used = content.data.get("used")
    size = used.get("size") if isinstance(used, dict) else None
    frame_size = None if size is None else _frame_size(content, content.array("used.size", (2,), value=size))
    lens = content.array("intrinsics", *_LENS[:3]) if content.has("intrinsics") else None
    plane = _plane(content) if content.data.get("ground_plane") is not None else None
    return Poses(
        content.array(f"{camera}_c2w", *MATRICES), stated=POSES, lens=lens, frame_size=frame_size, fit="crop",
        ground_plane=plane,
    )  # fmt: skip


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
    return Poses(unreal_to_opencv(torch.from_numpy(matrices)).numpy(), stated=POSES)


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
    """``pose/NAME.npz``, with intrinsics in pixels in ``../intrinsics/NAME.npz``; gaps in ``inds`` are lost frames.

    ViPE never moves the principal point from the middle of the frames that it saw, and ReDirector gives it frames that
    were scaled to cover 480x832 and cut in the centre.
    """
    matrices = content.array("data", *MATRICES)
    _check_frames(content, len(matrices))
    beside = vipe_lens(content.path)
    if not beside.is_file():
        return Poses(matrices)
    found = read_content(beside)
    lens = found.array("data", (1, 4), (len(matrices), 4))
    _check_frames(found, len(lens))
    return Poses(matrices, lens=lens, lens_unit="pixels", centred=True, fit="crop")


def vipe_lens(pose: Path) -> Path:
    """Where ViPE writes the intrinsics that belong to ``pose/NAME.npz``."""
    return pose.parent.parent / "intrinsics" / pose.name


def _check_frames(content: Content, count: int) -> None:
    inds = content.data.get("inds")
    if inds is not None and not np.array_equal(inds, np.arange(count)):
        raise content.error(f"ViPE lost frames: inds is not 0..{count - 1}; cut the video there and run ViPE again")


def _frame_size(content: Content, size: NDArray[np.float64]) -> tuple[int, int]:
    if not (((size >= 1) & (size <= MAX_SIDE)).all() and (size == size.round()).all()):
        raise content.error(f"the frame size {size.tolist()} is not a positive (H, W) in whole pixels")
    return int(size[0]), int(size[1])


def _flag(content: Content, name: str) -> bool:
    """A flag, which is 0 or 1: any other number would be a version or a unit of something else."""
    value = content.array(name, (), (1,)).reshape(())
    if value not in (0.0, 1.0):
        raise content.error(f"{name} is {value:g}; it must be true or false")
    return bool(value)


def _plane(content: Content) -> NDArray[np.float64] | None:
    """``ground_plane`` with a unit normal: the distance would be read in another unit otherwise."""
    if not content.has("ground_plane"):
        return None
    plane = content.array("ground_plane", (4,), (1, 4)).reshape(4)
    if not (np.abs(plane) < LARGEST).all() or not abs(np.linalg.norm(plane[:3]) - 1) < 1e-3:
        raise content.error(f"ground_plane {plane.tolist()} must be (n, d) with |n| = 1; divide it by |n|")
    return plane


def _read_redirect4d(content: Content, camera: str) -> Poses:
    """World-to-camera of every frame, metres; keyframes beside it are what the path was drawn from and are not read."""
    rows = [
        content.array(f"camera_path[{frame}].extrinsic", (3, 4), (4, 4), value=entry["extrinsic"])[:3]
        for frame, entry in enumerate(content.data["camera_path"])
    ]
    return Poses(np.stack(rows), "w2c", stated=frozenset({"direction", "unit"}))


def _is_redirect4d(content: Content) -> bool:
    path = content.data.get("camera_path") if isinstance(content.data, dict) else None
    return isinstance(path, list) and bool(path) and all(isinstance(e, dict) and "extrinsic" in e for e in path)


def _is_c2w(content: Content) -> bool:
    return content.has("c2w") or isinstance(content.data, np.ndarray | list)


def _is_vggt(content: Content) -> bool:
    try:
        return content.has("extrinsic") and np.shape(content.data["extrinsic"])[-2:] == (3, 4)
    except ValueError:  # lists of unequal length, which the reader of the other format names
        return False


def _is_recammaster(content: Content) -> bool:
    return isinstance(content.data, dict) and any(re.fullmatch(r"frame\d+", str(key)) for key in content.data)


def _is_vipe(content: Content) -> bool:
    return content.has("data") and isinstance(content.data["data"], np.ndarray)


FORMATS = (
    CameraFormat("c2w", "npy, npz or JSON with c2w [F, 4, 4]", _is_c2w, _read_c2w),
    CameraFormat("VGGT npz", "npz with extrinsic [F, 3, 4] and intrinsic (VGGT)", _is_vggt, _read_vggt),
    CameraFormat("geoalign npz", "npz with extrinsic [F, 4, 4] and intrinsic", lambda c: c.has("extrinsic"), _read_own),
    CameraFormat("nerfstudio transforms.json", "transforms.json of nerfstudio", is_nerfstudio, read_nerfstudio),
    CameraFormat(
        "Redirect4D trajectory", "trajectory.json of Redirect4D-Bench, with camera_path", _is_redirect4d,
        _read_redirect4d,
    ),
    CameraFormat("RealEstate10K text", "text of RealEstate10K (19 numbers a line)", is_re10k, read_re10k),
    CameraFormat("TUM text", "text of TUM (8 numbers a line)", is_tum, read_tum),
    CameraFormat("KITTI text", "text of KITTI (12 numbers a line)", is_kitti, read_kitti),
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
