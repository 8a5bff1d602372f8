"""The lens of a camera file as fractions of the video's frames: which unit its numbers have, and of which frames.

No pixel number is used without a frame size, and none of frames of another shape than the video's without knowing how
they were made from it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry.cameras.options import MAX_SIDE, CameraOptions, Fit
from geoalign.geometry.cameras.poses import Poses
from geoalign.geometry.lens import cover_crop_intrinsics, intrinsics_before_crop, intrinsics_before_pad, lens_fault

Size = tuple[int, int]
_LEAST_PIXELS = 8.0  # focal lengths and principal points of frames of at least 16 pixels
_SAME_SHAPE = 0.012  # VGGT rounds sides to 14 pixels, which stretches by up to 0.9 percent; 832x480 is 2.5 from 16:9
_OFF_CENTRE = 0.1  # real lenses are off by a few percent of the frame
_SIZE_FIX = "append #size=HEIGHTxWIDTH of the frames that the numbers belong to"


def file_lens(name: str, poses: Poses, options: CameraOptions, video: Size | None) -> Tensor | None:
    """``[4]``, ``[1, 4]`` or ``[F, 4]`` float64 fractions of the frames of ``video``, or None if the file has no lens.

    Without ``video`` they are fractions of the frames that the file's numbers belong to.

    Raises:
        DataError: numbers that are neither pixels nor fractions, of frames that nothing tells the size of, or of frames
            of another shape than the video's, a principal point outside the picture, an absurd focal length.
    """
    if poses.lens is None:
        return None
    lens = _four_numbers(name, poses.lens)
    with np.errstate(over="ignore"):  # what float32 cannot hold is used as infinity or zero
        single = lens.astype(np.float32)
    if not np.isfinite(single).all():
        raise DataError(f"{name}: NaN or infinite intrinsics")
    if not (single[:, :2] > 0).all():
        raise DataError(f"{name}: focal length that is not positive")
    stated = _stated_size(name, poses, options, video)
    pixels = _are_pixels(name, lens, poses)
    size = _size_of_pixels(name, lens, poses, options, stated, video) if pixels and stated is None else stated
    fractions = torch.from_numpy(lens.copy())
    if pixels:
        assert size is not None
        fractions = fractions / fractions.new_tensor([size[1], size[0], size[1], size[0]])
        _check(name, fractions, f"frames of {size[0]}x{size[1]}; {_SIZE_FIX}")
    if size is not None and video is not None and size != video:
        fractions = _of_video(name, fractions, size, video, options.fit or _habit(poses, size, video))
    if video is not None or poses.frame_size is None:  # a crop need not hold the principal point
        _check(name, fractions, "the frames; give fractions of (W, H, W, H), or pixels and their frame size")
    return fractions


def _four_numbers(name: str, lens: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[N, 4]`` of fx, fy, cx, cy in rows or in matrices, which must be those of a pinhole without skew."""
    if lens.shape[-2:] != (3, 3):
        return np.atleast_2d(lens)
    matrices = lens.reshape(-1, 3, 3)
    rest = matrices[:, [0, 1, 2, 2, 2], [1, 0, 0, 1, 2]]
    if not (np.abs(rest - [0, 0, 0, 0, 1]) <= 1e-3 * np.abs(matrices[:, :1, 0])).all():
        raise DataError(f"{name}: intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; transposed, or with skew?")
    return matrices[:, [0, 1, 0, 1], [0, 1, 2, 2]]


def _check(name: str, lens: Tensor, where: str) -> None:
    if (fault := lens_fault(lens)) is not None:
        raise DataError(f"{name}: {fault} of {where}")


def _stated_size(name: str, poses: Poses, options: CameraOptions, video: Size | None) -> Size | None:
    """The size that the file or the caller states; an error if both do and differ."""
    asked = video if options.size == "video" else options.size
    if options.size == "video" and video is None:
        raise DataError(f"{name}: size=video, but no video belongs to this camera; give size=HEIGHTxWIDTH")
    if poses.frame_size is not None and asked not in (None, poses.frame_size):
        height, width = poses.frame_size
        raise DataError(f"{name}: the file states frames of {height}x{width}; drop size={options.text('size')}")
    return poses.frame_size or (None if asked is None else (int(asked[0]), int(asked[1])))


def _are_pixels(name: str, lens: NDArray[np.float64], poses: Poses) -> bool:
    """Whether ``[N, 4]`` are pixels or fractions: the principal point tells, and the focal length must fit."""
    focal, centre = lens[:, :2], lens[:, 2:]
    fractions = bool(((centre > 0) & (centre < 1)).all() and (focal < _LEAST_PIXELS * 8).all())
    pixels = bool((centre >= _LEAST_PIXELS).all() and (focal >= _LEAST_PIXELS).all())
    if poses.lens_unit == ("fractions" if fractions else "pixels" if pixels else ""):
        return pixels
    if poses.lens_unit == "unknown" and (fractions or pixels):
        return pixels
    if poses.lens_unit == "fractions" and poses.frame_size is not None and not pixels:
        return False  # of a crop that need not hold the principal point; checked once the crop is undone
    fx, fy, cx, cy = (f"{value:g}" for value in lens[0])
    wanted = {"unknown": "neither pixels nor fractions of the frame", "pixels": "no pixels"}
    raise DataError(
        f"{name}: intrinsics (fx {fx}, fy {fy}, cx {cx}, cy {cy}) are {wanted.get(poses.lens_unit, 'no fractions')}: "
        "the principal point must lie inside the picture; give all four in one unit"
    )


def _size_of_pixels(
    name: str, lens: NDArray[np.float64], poses: Poses, options: CameraOptions, stated: Size | None, video: Size | None
) -> Size:
    """(H, W) of the frames that pixels without a stated size belong to: the video's, if the principal point lies near
    its middle; else those that it is the exact middle of, if their shape, or the habit of the tool, supports that."""
    middle = _middle_of(lens)
    if middle is not None and (poses.centred or (video is not None and _same_shape(middle, video))):
        return middle
    if video is None:
        raise DataError(
            f"{name}: its intrinsics are in pixels of frames of unknown size; write image_size (H, W) or {_SIZE_FIX}"
        )
    x, y = (lens[:, 2:] / [video[1], video[0]]).mean(axis=0)
    if abs(x - 0.5) > _OFF_CENTRE or abs(y - 0.5) > _OFF_CENTRE:
        raise DataError(
            f"{name}: its principal point lies at ({x:.2f}, {y:.2f}) of the video's frames of {video[0]}x{video[1]}: "
            f"the numbers seem to belong to other frames; {_SIZE_FIX} (#size=video takes them as they are)"
        )
    return video


def _middle_of(lens: NDArray[np.float64]) -> Size | None:
    """The whole (H, W) that all principal points of ``[N, 4]`` are the middle of, or None."""
    if lens[:, 2:].max() > MAX_SIDE:  # of no frame that is read, and twice the largest numbers is infinite
        return None
    width, height = 2 * lens[0, 2:]
    whole = round(height), round(width)
    exact = np.abs(2 * lens[:, 2:] - [whole[1], whole[0]]).max() < 0.01
    return whole if exact and min(whole) >= 2 * _LEAST_PIXELS else None


def _habit(poses: Poses, size: Size, video: Size) -> Fit | None:
    """The fit that the format is known for. A video that is smaller than the frames may be the one that was cut."""
    smaller = video[0] < size[0] and video[1] < size[1]
    return None if poses.centred and smaller else poses.fit


def _of_video(name: str, lens: Tensor, size: Size, video: Size, fit: Fit | None) -> Tensor:
    """Fractions of frames of ``size`` as fractions of those of ``video``."""
    if fit == "crop":
        return intrinsics_before_crop(lens, *video, size)
    if fit == "pad":
        return intrinsics_before_pad(lens, *video, size)
    if fit == "source":
        return cover_crop_intrinsics(lens, *size, video)
    if fit == "stretch" or _same_shape(size, video):
        return lens
    raise DataError(
        f"{name}: its intrinsics belong to frames of {size[0]}x{size[1]}, which have another shape than the video's "
        f"{video[0]}x{video[1]}; append #fit=crop, pad or stretch, by which they were made from the video, or "
        "#fit=source if the video was cropped from them"
    )


def _same_shape(a: Size, b: Size) -> bool:
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) < _SAME_SHAPE
