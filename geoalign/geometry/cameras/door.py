"""The door: whatever stands for a camera, wherever a user may give one, is opened here and nowhere else.

A camera is named by a preset (``pan_right``), by a file of one of the ``FORMATS``, or, where a file holds several
cameras, by ``FILE#CAMERA`` (``camera_extrinsics.json#cam05``). What a file does not say of its axes, direction, unit
and frame size follows as options (``poses.npy#axes=opengl:unit=cm``, :mod:`geoalign.geometry.cameras.options`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoalign.errors import DataError, UsageError, argument
from geoalign.geometry.cameras.camera_file import CameraFile
from geoalign.geometry.cameras.content import Content, NumberLines, read_content
from geoalign.geometry.cameras.file_lens import file_lens
from geoalign.geometry.cameras.formats import FORMATS, vipe_lens
from geoalign.geometry.cameras.options import CameraOptions, parse_choice
from geoalign.geometry.cameras.poses import CameraFormat, camera_to_world
from geoalign.geometry.presets import preset, preset_name
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, LARGEST, CameraTrajectory

CAMERA_SUFFIXES = frozenset({".npz", ".npy", ".json", ".txt"})
"""What is looked for in a folder; a file that is named is recognised by its content."""

_NO_OPTIONS = CameraOptions()

Lens = Tensor | Sequence[float] | None
Name = str | os.PathLike[str]


def open_camera(
    name: Name,
    *,
    frames: int | None = None,
    image_size: tuple[int, int] | None = None,
    intrinsics: Lens = None,
    prefer: str | None = None,
) -> CameraFile:
    """Open a preset or a camera file.

    Args:
        name: preset, ``FILE`` or ``FILE#CAMERA:option=value``.
        frames: length of a preset, and the least number of poses of a file.
        image_size: (H, W) of the video that the camera belongs to, for files with intrinsics in pixels.
        intrinsics: fx, fy, cx, cy as fractions of (W, H, W, H); replaces what a file says.
        prefer: the camera to take from a file that holds several, one of them so called, when ``name`` chooses none.

    Raises:
        UsageError: unknown preset or option, or a preset without a length.
        DataError: missing, damaged or unknown file, NaN, a reflection, too few poses, no such camera or several, an
            option that the file contradicts, a lens of unknown unit or frame size.
    """
    if _names_preset(name):
        return _open_preset(os.fspath(name), frames, intrinsics)
    file, choice = split_name(name)
    camera, options = parse_choice(choice)
    opened = open_file(file)
    found = opened.read(opened.choose(camera, prefer), options, image_size=image_size, intrinsics=intrinsics)
    if frames is not None and found.path.num_frames < frames:
        count = found.path.num_frames
        fix = f"use {argument('frames', count)} or a longer file"
        raise DataError(f"{found.name}: {count} poses, {frames} are needed; {fix}")
    return found


def open_target(name: Name, frames: int, *, speed: float = 1.0, intrinsics: Lens = None) -> CameraTrajectory:
    """A target path ``[frames]`` float32 whose frame 0 is the identity.

    Args:
        name: as in :func:`open_camera`; of the JSON of ``geoalign sample`` the target is taken.
        frames: a preset goes on at its speed; of a file the first poses are taken, or all are spread over more frames.
        speed: multiplies the motion per frame.
        intrinsics: of the target's frames; default: the file's, else 60 degrees.

    Raises:
        UsageError, DataError: as :func:`open_camera`.
    """
    if _names_preset(name):
        lens = DEFAULT_INTRINSICS if intrinsics is None else intrinsics
        return _within_reach(name, speed, preset(preset_name(os.fspath(name)), frames, speed=speed, intrinsics=lens))
    return fit_target(open_camera(name, intrinsics=intrinsics, prefer="target").path, frames, speed, name)


def fit_target(path: CameraTrajectory, frames: int, speed: float = 1.0, name: Name = "the path") -> CameraTrajectory:
    """A given ``path`` as the target of a video: what :func:`open_target` makes of the path in the file ``name``."""
    path = path.frames(slice(0, frames)) if path.num_frames >= frames else path.resample(frames)
    path = path.relative_to_first()
    if speed != 1.0:
        rotvec, step = path.increments()
        path = CameraTrajectory.from_increments(speed * rotvec, speed * step, path.intrinsics)
    return _within_reach(name, speed, path.to(dtype=torch.float32))


def _within_reach(name: Name, speed: float, path: CameraTrajectory) -> CameraTrajectory:
    """``path`` unless it goes beyond what float32 can hold, carried there by ``speed`` if that is not 1."""
    if not bool((path.c2w.abs() <= LARGEST).all()):
        why = "moves" if speed == 1.0 else f"speed {speed:g} moves"
        fix = "wrong unit?" if speed == 1.0 else "lower it"
        raise UsageError(f"{os.fspath(name)}: {why} the camera by more than {LARGEST:g} m; {fix}")
    return path


def camera_file_beside(video: Path) -> Path:
    """Where the camera file of a video, or of a folder of frames, is looked for."""
    return video.with_suffix(".npz")


def camera_beside(video: Path, size_of: Callable[[Path], tuple[int, int]]) -> CameraFile | None:
    """The camera that lies beside a video under its name, ``clip.npz`` of ``clip.mp4`` or of a folder ``clip``.

    None if there is no such file; only for one is ``size_of`` asked for (H, W) of the video, which its lens depends on.

    Raises:
        DataError: the file is damaged, no camera file, or one of frames of another shape.
    """
    path = camera_file_beside(video)
    return open_camera(path, image_size=size_of(video)) if path.is_file() else None


def is_preset(name: Name) -> bool:
    """Whether ``name`` is a preset, which has no length of its own; raises UsageError for one that does not exist."""
    if not _names_preset(name):
        return False
    preset_name(os.fspath(name))
    return True


def _names_preset(name: Name) -> bool:
    """A word without suffix and folder that is no file is meant as a preset."""
    path = split_name(name)[0]
    return not path.suffix and path.name == os.fspath(name) and not path.is_file()


def _open_preset(name: str, frames: int | None, intrinsics: Lens) -> CameraFile:
    canonical = preset_name(name)
    if frames is None:
        raise UsageError(f"{name}: a preset has no length of its own; give {argument('frames', 'N')}, or a camera file")
    lens = DEFAULT_INTRINSICS if intrinsics is None else intrinsics
    path = preset(canonical, frames, intrinsics=lens, dtype=torch.float64)
    return CameraFile(canonical, "preset", path, intrinsics is not None)


def split_name(name: Name) -> tuple[Path, str]:
    """``FILE#CHOICE`` as file and choice ("" if none), which :func:`parse_choice` reads; a file whose own name holds
    ``#`` is itself."""
    text = os.fspath(name)
    file, mark, camera = text.rpartition("#")
    return (Path(file), camera) if mark and file and not Path(text).exists() else (Path(text), "")


def files_of(file: Path) -> tuple[Path, ...]:
    """The files that a camera is read from: ``file``, and the intrinsics that ViPE writes elsewhere."""
    beside = vipe_lens(file)
    return (file, beside) if file.parent.name == "pose" and beside.is_file() else (file,)


@dataclass(frozen=True, slots=True, eq=False)
class OpenFile:
    """A camera file that was read and recognised; its cameras are parsed one at a time."""

    content: Content
    format: CameraFormat

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of its cameras; ("",) of a file that holds one without a name."""
        return self.format.cameras(self.content)

    def choose(self, camera: str, prefer: str | None = None) -> str:
        """The camera called ``camera`` (``cam05`` also as 5); without one the preferred or the only one.

        Raises:
            DataError: there is no such camera, or several to choose from.
        """
        cameras, file = self.cameras, self.content.path
        if not camera and prefer in cameras:
            return str(prefer)
        if not camera and len(cameras) == 1:
            return cameras[0]
        if not camera:
            raise DataError(f"{file}: holds the cameras {_listed(cameras)}; choose one, as in {file.name}#{cameras[0]}")
        for called in (camera, f"cam{camera.zfill(2)}"):
            if called in cameras and called:
                return called
        if cameras == ("",):
            raise DataError(f"{file}: holds one camera without a name; drop #{camera}")
        raise DataError(f"{file}: no camera {camera!r}; it holds {_listed(cameras)}")

    def read(
        self, camera: str, options: CameraOptions = _NO_OPTIONS, *, image_size: tuple[int, int] | None = None,
        intrinsics: Lens = None,
    ) -> CameraFile:  # fmt: skip
        """Read and validate one of :attr:`cameras`; arguments and errors are those of :func:`open_camera`."""
        poses = self.format.read(self.content, camera)
        name = f"{self.content.path}#{camera}" if camera else str(self.content.path)
        lens = file_lens(name, poses, options, image_size) if intrinsics is None else intrinsics
        given = torch.as_tensor(DEFAULT_INTRINSICS if lens is None else lens, dtype=torch.float64)
        path, metres, plane = camera_to_world(name, poses, options, given)
        return CameraFile(name, self.format.name, path, lens is not None, metres is not None, plane)


def open_file(path: Path) -> OpenFile:
    """Read a file and recognise its format.

    Raises:
        DataError: missing, damaged, or of no known format.
    """
    content = read_content(path)
    for known in FORMATS:
        if known.matches(content):
            return OpenFile(content, known)
    if isinstance(content.data, NumberLines):
        keys = f"has {content.data.rows.shape[1]} numbers a line"
    else:
        keys = f"has the keys {_listed(tuple(map(str, content.data)))}" if content.data else "is empty"
    raise content.error(f"not a known camera file ({keys}); known: {'; '.join(known.holds for known in FORMATS)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
