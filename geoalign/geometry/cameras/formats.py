"""Reading and writing camera paths: our own JSON and npz, ReCamMaster JSON, ViPE npz, OpenCV npy or JSON.

Every loader returns one trajectory ``[F]`` relative to frame 0 in OpenCV axes and metres, computed in float64, and
raises ``DataError`` naming the file and the fix for anything that is not a camera path.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoalign.errors import DataError, UsageError
from geoalign.geometry.presets import unreal_to_opencv
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory
from geoalign.io_utils import atomic_path, atomic_write_text

TrajectoryFormat = Literal["auto", "own", "recammaster", "vipe", "opencv"]
Lens = Tensor | Sequence[float] | None
PathLike = str | os.PathLike[str]
_FORMAT_NAME = "geoalign-trajectory"


def save_trajectory(path: PathLike, trajectory: CameraTrajectory) -> None:
    """Write one trajectory ``[F]`` as ``.json`` (readable, exact) or ``.npz`` (float64), atomically.

    Raises:
        UsageError: another suffix, or a batch of trajectories.
    """
    path = Path(path)
    if trajectory.batch_shape:
        raise UsageError(f"{path}: one file holds one trajectory, got a batch {tuple(trajectory.batch_shape)}")
    c2w = trajectory.c2w.detach().cpu().double().numpy()
    lens = trajectory.intrinsics.detach().cpu().double().numpy()
    if path.suffix == ".npz":
        with atomic_path(path) as temporary:
            np.savez(temporary, c2w=c2w, intrinsics=lens)
    elif path.suffix == ".json":
        atomic_write_text(path, _own_json(c2w, lens))
    else:
        raise UsageError(f"{path}: trajectories are written as .json or .npz, not {path.suffix!r}")


def _own_json(c2w: NDArray[np.float64], lens: NDArray[np.float64]) -> str:
    """One frame per line, so that files diff and read well."""
    head = {"format": _FORMAT_NAME, "version": 1, "axes": "OpenCV camera-to-world, metres", "num_frames": len(c2w)}
    rows = {"c2w": c2w.tolist(), "intrinsics": lens.tolist()}
    body = (f' "{key}": [\n  ' + ",\n  ".join(json.dumps(row) for row in value) + "\n ]" for key, value in rows.items())
    return json.dumps(head)[:-1] + ",\n" + ",\n".join(body) + "\n}\n"


def load_trajectory(
    path: PathLike,
    *,
    format: TrajectoryFormat = "auto",
    camera: str | int = 1,
    intrinsics: Lens = None,
    image_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> CameraTrajectory:
    """Read one trajectory ``[F]``, relative to frame 0.

    Args:
        format: ``auto`` decides by suffix and content.
        camera: which camera of a ReCamMaster file (``"cam03"`` or 3).
        intrinsics: fx, fy, cx, cy as fractions of (W, H, W, H), for files that carry none; replaces those that do.
        image_size: (H, W) in pixels, needed to read ViPE intrinsics.

    Raises:
        DataError: missing, truncated or malformed file; NaN, reflection, wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such trajectory file")
    if format == "auto":
        format = _detect(path)
    if format == "own":
        trajectory = load_own(path, intrinsics=intrinsics)
    elif format == "recammaster":
        trajectory = load_recammaster(path, camera, intrinsics=intrinsics)
    elif format == "vipe":
        trajectory = load_vipe(path, intrinsics=intrinsics, image_size=image_size)
    elif format == "opencv":
        trajectory = load_opencv(path, intrinsics=intrinsics)
    else:
        raise UsageError(f"unknown trajectory format {format!r}; choose auto, own, recammaster, vipe or opencv")
    return trajectory.to(dtype=dtype)


def _detect(path: Path) -> TrajectoryFormat:
    if path.suffix == ".npz":
        return "own" if "c2w" in _read_npz(path) else "vipe"
    if path.suffix == ".json":
        data = _read_json(path)
        if isinstance(data, dict) and data.get("format") == _FORMAT_NAME:
            return "own"
        return "recammaster" if isinstance(data, dict) and "frame0" in data else "opencv"
    if path.suffix == ".npy":
        return "opencv"
    raise DataError(f"{path}: a trajectory is a .json, .npz or .npy file, not {path.suffix!r}")


def load_own(path: PathLike, *, intrinsics: Lens = None) -> CameraTrajectory:
    """Read a file of :func:`save_trajectory`."""
    path = Path(path)
    data = _read_npz(path) if path.suffix == ".npz" else _read_json(path)
    try:
        poses, lens = data["c2w"], data["intrinsics"]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a geoalign trajectory: keys c2w and intrinsics are needed") from error
    return _finish(path, _array(path, poses, "c2w"), intrinsics, _array(path, lens, "intrinsics"))


def load_recammaster(path: PathLike, camera: str | int = 1, *, intrinsics: Lens = None) -> CameraTrajectory:
    """Read one camera of a ReCamMaster / MultiCamVideo extrinsics JSON (row vectors, Unreal axes, centimetres).

    Quirks absorbed: the left-handed world (absolute matrices are reflections), the transposed layout, ``-0`` tokens,
    frames in any order.
    """
    path = Path(path)
    data = _read_json(path)
    key = f"cam{int(camera):02d}" if str(camera).isdigit() else str(camera)
    if not isinstance(data, dict) or "frame0" not in data:
        raise DataError(f"{path}: not a ReCamMaster camera file: the key frame0 is missing")
    rows = []
    for frame in range(len(data)):
        entry = data.get(f"frame{frame}")
        if not isinstance(entry, dict):
            raise DataError(f"{path}: frame{frame} is missing; {len(data)} consecutive frames were expected")
        if key not in entry:
            raise DataError(f"{path}: frame{frame} has no camera {key!r}; it has {', '.join(sorted(entry)[:12])}")
        rows.append(_parse_rows(path, frame, key, entry[key]))
    matrices = torch.stack(rows)
    if not torch.isfinite(matrices).all():
        raise DataError(f"{path}: {key}: NaN or infinite pose")
    return _finish(path, unreal_to_opencv(matrices).numpy(), intrinsics, None, name=f"{path}: {key}")


def _parse_rows(path: Path, frame: int, key: str, text: Any) -> Tensor:
    tokens = str(text).replace("[", " ").replace("]", " ").split()
    try:
        values = [float(token) for token in tokens]
    except ValueError as error:
        raise DataError(f"{path}: frame{frame} {key}: {error}") from error
    if len(values) != 16:
        raise DataError(f"{path}: frame{frame} {key}: 16 numbers expected, got {len(values)}")
    return torch.tensor(values, dtype=torch.float64).view(4, 4)


def load_vipe(
    path: PathLike, *, intrinsics: Lens = None, image_size: tuple[int, int] | None = None
) -> CameraTrajectory:
    """Read ViPE's ``pose/NAME.npz`` (``data`` [N, 4, 4] c2w, ``inds``) and, with ``image_size``, its intrinsics.

    Intrinsics lie in ``../intrinsics/NAME.npz`` as fx, fy, cx, cy in pixels. Gaps in ``inds`` mean that ViPE lost
    frames, and are refused.
    """
    path = Path(path)
    data = _read_npz(path)
    if "data" not in data:
        raise DataError(f"{path}: not a ViPE pose file: key 'data' is missing (found {', '.join(data) or 'nothing'})")
    poses = _array(path, data["data"], "data")
    inds = data.get("inds")
    if inds is not None and not np.array_equal(inds, np.arange(len(poses))):
        raise DataError(f"{path}: ViPE lost frames: inds is not 0..{len(poses) - 1}")
    lens_path = path.parent.parent / "intrinsics" / path.name
    lens = None
    if intrinsics is None and lens_path.is_file():
        if image_size is None:
            raise DataError(f"{lens_path}: intrinsics are in pixels; give the image size (H, W) or own intrinsics")
        height, width = image_size
        pixels = _array(lens_path, _read_npz(lens_path).get("data"), "data")
        if pixels.shape != (len(poses), 4):
            raise DataError(f"{lens_path}: intrinsics must be [{len(poses)}, 4], got {list(pixels.shape)}")
        lens = pixels / np.array([width, height, width, height], dtype=np.float64)
    return _finish(path, poses, intrinsics, lens)


def load_opencv(path: PathLike, *, intrinsics: Lens = None) -> CameraTrajectory:
    """Read OpenCV camera-to-world matrices ``[F, 3 or 4, 4]`` from npy or JSON.

    JSON is a list of matrices, or an object with ``c2w`` and, as fractions of (W, H, W, H), ``intrinsics``.
    """
    path = Path(path)
    lens = None
    if path.suffix == ".npy":
        poses = _guarded(path, lambda raw: np.load(io.BytesIO(raw), allow_pickle=False))
    else:
        poses = _read_json(path)
        if isinstance(poses, dict):
            if "c2w" not in poses:
                raise DataError(f"{path}: neither a list of matrices nor an object with the key c2w")
            lens = _array(path, poses["intrinsics"], "intrinsics") if "intrinsics" in poses else None
            poses = poses["c2w"]
    return _finish(path, _array(path, poses, "c2w"), intrinsics, lens)


def _guarded(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """Read the whole file and parse it; every way in which a damaged file can fail becomes a ``DataError``."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy, zipfile and zlib raise a dozen unrelated types on damaged input
        raise DataError(f"{path}: damaged, or not a {path.suffix} file ({type(error).__name__}: {error})") from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    def parse(raw: bytes) -> dict[str, NDArray[Any]]:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            return {key: archive[key] for key in archive.files}

    return _guarded(path, parse)


def _read_json(path: Path) -> Any:
    return _guarded(path, lambda raw: json.loads(raw.decode("utf-8-sig")))


def _array(path: Path, value: Any, name: str) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {name} is not an array of numbers") from error


def _finish(
    path: Path, poses: NDArray[np.float64], wanted: Lens, found: NDArray[np.float64] | None, *, name: str | None = None
) -> CameraTrajectory:
    """Validate, choose the lens (caller's, file's, default) and re-base to frame 0."""
    if poses.ndim == 3 and poses.shape[1:] == (3, 4):
        last = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(poses), 1, 4))
        poses = np.concatenate((poses, last), axis=1)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise DataError(f"{path}: one camera path is [frames, 4, 4], got {list(poses.shape)}")
    lens = wanted if wanted is not None else DEFAULT_INTRINSICS if found is None else torch.from_numpy(found)
    trajectory = CameraTrajectory.validated(torch.tensor(poses), lens, name=name or str(path))
    return trajectory.relative_to_first()
