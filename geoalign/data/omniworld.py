"""OmniWorld-Game camera archives: reader and writer.

An archive ``{uid}_others.tar.gz`` (or the folder it unpacks to) holds ``split_info.json``, ``fps.txt``,
``camera/split_{k}.json`` and ``text/{first}_{last}.json``. Quirks absorbed here: rotations are scalar-first quaternions
and poses are world-to-camera; every split has its own world frame, so no window crosses splits; lengths are in an
arbitrary unit per scene. Source: github.com/yangzhou24/OmniWorld and its dataset card.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from geoalign.config.data import TrajectoriesConfig
from geoalign.data.folders import visible, walk
from geoalign.data.tables import read_columns, read_table
from geoalign.data.tally import Tally
from geoalign.data.tracks import CameraTrack, valid_runs, window_starts
from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_write_bytes
from geoalign.files.parsing import check_regular, read_bytes
from geoalign.geometry import so3
from geoalign.geometry.trajectory import LARGEST, CameraTrajectory

ARCHIVE_SUFFIX = "_others.tar.gz"
QUATERNION_TOLERANCE = 0.01
"""Quaternions whose norm is further than this from 1 mark a failed pose (stored ones carry six digits or more)."""
_DEFAULT_FPS = 24.0
_MAX_MEMBER = 32 << 20  # bytes; no camera or text file comes near, a larger one is damage
_MAX_MEMBERS = 100_000
_SLACK, _RATIO = 256 << 20, 100  # inflated bytes that any archive may have, and more per stored byte
_WANTED = re.compile(r"(?:^|.*/)(split_info\.json|fps\.txt|camera/split_\d+\.json|text/\d+_\d+\.json)$")


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """A row of ``omniworld_game_metadata.csv``; ``test_splits`` is None where the table has no such column."""

    test_splits: frozenset[int] | None
    metric_scale: float | None
    fps: float | None


def read_metadata(path: Path, tally: Tally) -> dict[str, SceneFacts]:
    """Read the scene table (columns ``UID``, ``Test Split Index``, ``FPS``, ``Metric Scale``), keyed by uid.

    Rows that do not fit go to ``tally``.

    Raises:
        DataError: the file cannot be read or has no ``UID`` column.
    """
    table = read_table(path)
    if "UID" not in table.columns:
        raise DataError(f"{path}: expected a column 'UID', got {list(table.columns)}")
    tells_splits = "Test Split Index" in table.columns
    for line, cause in table.misfits:
        tally.reject(f"{path.name} line {line}", cause)
    facts = {}
    for row in table.rows:
        if not (uid := row.values.get("UID")):
            tally.reject(f"{path.name} line {row.line}", "row without a UID")
            continue
        test = frozenset(int(number) for number in re.findall(r"\d+", row.values.get("Test Split Index", "")))
        scale, fps = _positive(row.values.get("Metric Scale")), _positive(row.values.get("FPS"))
        facts[uid] = SceneFacts(test if tells_splits else None, scale, fps)
    return facts


def find_scene_table(folder: Path) -> Path | None:
    """The csv in ``folder`` or its ``metadata`` (as on the hub) that describes scenes, by its columns; None without.

    Raises:
        DataError: several csv files do.
    """
    files = [*visible(folder.glob("*.csv")), *visible((folder / "metadata").glob("*.csv"))]
    columns = {file: set(read_columns(file)) for file in files}
    tables = [file for file in files if "UID" in columns[file] and columns[file] & {"Test Split Index", "Metric Scale"}]
    if len(tables) > 1:
        raise DataError(
            f"{folder}: several tables of scenes ({', '.join(map(str, tables))}); "
            "name one in data.trajectories.metadata"
        )
    return tables[0] if tables else None


def find_scenes(path: Path) -> list[Path]:
    """Archives and unpacked scene folders under ``path`` (or ``path`` itself), by uid; archives before folders."""
    if path.is_file():
        return [path]
    found = walk(path)
    archives = {file for file in found if file.name.endswith(ARCHIVE_SUFFIX)}
    folders = {info.parent for info in found if info.name == "split_info.json"}
    return sorted(archives | folders, key=lambda scene: (scene_id(scene), scene in folders, str(scene)))


def scene_id(path: Path) -> str:
    """The uid of an archive or scene folder."""
    return path.name.removesuffix(ARCHIVE_SUFFIX)


def load_scene(
    path: Path, num_frames: int, config: TrajectoriesConfig, tally: Tally, facts: SceneFacts | None = None
) -> list[CameraTrack]:
    """Read one scene and apply the rejection rules; defects go to ``tally``, one entry per split or window.

    Rules: listed broken scenes; splits whose refined reprojection error is too large or whose file is unreadable;
    frames with non-finite numbers, a quaternion norm off 1 by more than ``QUATERNION_TOLERANCE``, a focal length <= 0
    or an entry in ``invalid_frame``; windows that contain such a frame or a gap in frame ids.
    """
    uid = scene_id(path)
    if uid in config.skip_scenes:
        tally.reject(uid, "scene listed as broken")
        return []
    try:
        members = _read_members(path)
        splits = _split_ids(members, path)
    except DataError:
        tally.reject(uid, "unreadable archive")
        return []
    fps = _scene_fps(members) or (facts.fps if facts else None) or _DEFAULT_FPS
    texts = sorted(
        (int(first), int(last))
        for name in members
        if name.startswith("text/")
        for first, last in [PurePosixPath(name).stem.split("_")]
    )
    tracks = []
    for index, ids in enumerate(splits):
        name = f"{uid}/split_{index}"
        try:
            track = _load_split(name, members.get(f"camera/split_{index}.json"), ids, config, tally)
        except _Rejected as rejected:
            tally.reject(name, str(rejected))
            continue
        starts = _windows(name, track, texts, num_frames, config.window_step, tally)
        if not starts:
            tally.reject(name, f"no window of {num_frames} valid frames")
            continue
        tally.accepted += 1
        tracks.append(
            CameraTrack(
                name,
                track.path,
                fps,
                starts,
                facts.metric_scale if facts else None,
                index in facts.test_splits if facts and facts.test_splits is not None else None,
            )
        )
    return tracks


class _Rejected(Exception):
    """A split that cannot be used, with the cause."""


@dataclass(frozen=True, slots=True)
class _Split:
    path: CameraTrajectory
    valid: list[bool]
    ids: list[int]


def _load_split(name: str, raw: bytes | None, ids: list[int], config: TrajectoriesConfig, tally: Tally) -> _Split:
    if raw is None:
        raise _Rejected("no camera file")
    try:
        record = json.loads(raw)
        quaternions = np.asarray(record["quats"], dtype=np.float64).reshape(-1, 4)
        translations = np.asarray(record["trans"], dtype=np.float64).reshape(-1, 3)
        focals = np.asarray(record["focals"], dtype=np.float64).reshape(-1)
        centre = np.asarray([np.mean(record["cx"]), np.mean(record["cy"])], dtype=np.float64)
        error = float(np.mean(record.get("reproj_error_after_refine") or 0.0))
        marked = _marked(record.get("invalid_frame") or ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise _Rejected("unreadable camera file") from None
    if not error <= config.max_reprojection_error:
        raise _Rejected("reprojection error")
    if not (np.isfinite(centre).all() and (centre > 0).all()):
        raise _Rejected("bad principal point")
    count = min(len(ids), len(quaternions), len(translations), len(focals))
    if {len(ids), len(quaternions), len(translations), len(focals)} != {count}:
        tally.remarks["camera arrays of unequal length, cut to the shortest"] += 1
    if count == 0:
        raise _Rejected("empty split")
    quaternions, translations, focals, ids = quaternions[:count], translations[:count], focals[:count], ids[:count]
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(quaternions, axis=1)
    causes = {
        "non-finite pose": ~((np.abs(translations) < LARGEST).all(1) & np.isfinite(norms)),
        "quaternion norm": np.abs(norms - 1) > QUATERNION_TOLERANCE,
        "focal length": ~((focals > 0) & (focals < LARGEST)),
        # Nobody documents whether these are positions in the split or frame ids: an entry excludes both readings.
        "marked invalid": np.array([index in marked or frame in marked for index, frame in enumerate(ids)]),
    }
    bad = np.zeros(count, dtype=bool)
    for cause, flags in causes.items():
        if (new := int((flags & ~bad).sum())) > 0:
            tally.remarks[f"frames excluded: {cause}"] += new
        bad |= flags
    quaternions[bad], translations[bad], focals[bad] = (1.0, 0.0, 0.0, 0.0), 0.0, 1.0
    intrinsics = np.stack(
        [focals / (2 * centre[0]), focals / (2 * centre[1]), np.full(count, 0.5), np.full(count, 0.5)], axis=1
    )
    c2w = poses_from_wxyz(torch.from_numpy(quaternions), torch.from_numpy(translations))
    return _Split(CameraTrajectory(c2w, torch.from_numpy(intrinsics)), [not flag for flag in bad], ids)


def _marked(entries: Sequence[Any]) -> set[int]:
    """Frames that ``invalid_frame`` excludes: it is a list of numbers, or a mask with a boolean per frame."""
    if all(isinstance(entry, bool) for entry in entries):
        return {index for index, entry in enumerate(entries) if entry}
    return {int(entry) for entry in entries}


def poses_from_wxyz(quaternions: Tensor, translations: Tensor) -> Tensor:
    """Camera-to-world ``[S, 4, 4]`` from world-to-camera wxyz quaternions ``[S, 4]`` and translations ``[S, 3]``."""
    rotation = so3.matrix_from_quaternion(quaternions.roll(-1, dims=-1))
    return so3.invert_rigid(so3.rigid(rotation, translations))


def _windows(
    name: str, split: _Split, texts: list[tuple[int, int]], num_frames: int, step: int, tally: Tally
) -> tuple[int, ...]:
    """Window starts: where the archive's captions begin, else every ``step`` frames of each valid run."""
    runs = valid_runs(split.valid, split.ids)
    position = {frame: index for index, frame in enumerate(split.ids)}
    listed = [position[first] for first, last in texts if first in position and last - first + 1 >= num_frames]
    if not listed:
        return window_starts(runs, num_frames, step)
    good = []
    for start in listed:
        if any(begin <= start and start + num_frames <= stop for begin, stop in runs):
            good.append(start)
        else:
            tally.reject(f"{name}@{start}", "captioned window with a gap or an invalid frame")
    return tuple(good)


def _read_members(path: Path) -> dict[str, bytes]:
    """The small files of an archive or folder, keyed by their path inside the scene."""
    try:
        if path.is_dir():
            found = {file.relative_to(path).as_posix(): file for file in walk(path) if file.is_file()}
            wanted = {match[1]: file for name, file in found.items() if (match := _WANTED.match(name))}
            return {name: read_bytes(file, limit=_MAX_MEMBER) for name, file in wanted.items()}
        return _unpack(path)
    except DataError:
        raise
    except Exception as error:  # of gzip, zlib and tarfile on damaged bytes
        raise DataError(f"{path}: cannot be unpacked ({error}); download it again") from error


def _unpack(path: Path) -> dict[str, bytes]:
    members, size = {}, check_regular(path)
    with gzip.open(path) as inflated:
        stream = _Bounded(inflated, path, _SLACK + _RATIO * size)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
            for count, member in enumerate(archive):
                if count >= _MAX_MEMBERS:
                    raise DataError(f"{path}: more than {_MAX_MEMBERS:,} files; not an archive of this kind")
                match = _WANTED.match(member.name)
                if match and member.isfile() and member.size <= _MAX_MEMBER:
                    content = archive.extractfile(member)
                    members[match[1]] = content.read() if content else b""
        while stream.read(1 << 20):  # to the end of the file, where gzip compares its checksum
            pass
    return members


class _Bounded:
    """What tarfile needs of a stream, refusing single reads and totals that no archive of this kind asks for."""

    def __init__(self, stream: gzip.GzipFile, path: Path, limit: int) -> None:
        self._stream, self._path, self._limit = stream, path, limit

    def read(self, size: int) -> bytes:
        self._check(size <= _MAX_MEMBER and self.tell() + size <= self._limit + _MAX_MEMBER)
        data = self._stream.read(size)
        self._check(self.tell() <= self._limit)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check(whence == io.SEEK_SET and offset <= self._limit)
        return self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, within: bool) -> None:
        if not within:
            raise DataError(f"{self._path}: inflates beyond {self._limit:,} bytes or holds a file beyond all measure")


def _split_ids(members: Mapping[str, bytes], path: Path) -> list[list[int]]:
    try:
        splits = json.loads(members["split_info.json"])["split"]
        return [[int(frame) for frame in split] for split in splits]
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: no usable split_info.json ({error!r})") from error


def _scene_fps(members: Mapping[str, bytes]) -> float | None:
    match = re.search(rb"FPS:\s*([0-9.]+)", members.get("fps.txt", b""))
    return _positive(match[1].decode()) if match else None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def split_record(
    path: CameraTrajectory, *, image_size: tuple[int, int] = (720, 1280), reprojection_error: float = 1.0
) -> dict[str, Any]:
    """The content of ``camera/split_k.json`` for one camera path.

    Args:
        path: ``[S]`` camera path; square pixels and a centred principal point are required, because the format has one
            focal length per frame and one centre per split.
        image_size: (H, W) in pixels.
        reprojection_error: stored as the refined reprojection error.
    """
    height, width = image_size
    lens = path.intrinsics.double()
    focal = lens[:, 0] * width
    if not torch.allclose(focal, lens[:, 1] * height, rtol=1e-4) or not torch.allclose(
        lens[:, 2:], torch.full_like(lens[:, 2:], 0.5), atol=1e-4
    ):
        raise UsageError("the format stores one focal length per frame and a centred principal point")
    w2c = path.w2c.double()
    quaternions = so3.quaternion_from_matrix(w2c[:, :3, :3]).roll(1, dims=-1)
    return {
        "focals": focal.tolist(),
        "cx": width / 2,
        "cy": height / 2,
        "quats": quaternions.tolist(),
        "trans": w2c[:, :3, 3].tolist(),
        "reproj_error_before_refine": reprojection_error,
        "reproj_error_after_refine": reprojection_error,
        "input_size": 0.5,
        "invalid_frame": [],
    }


def write_archive(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    fps: float,
    split_ids: Sequence[Sequence[int]] | None = None,
    windows: Sequence[tuple[int, int]] = (),
) -> None:
    """Write an archive of camera splits atomically; equal input gives equal bytes.

    Args:
        path: ``.../{uid}_others.tar.gz``.
        records: one :func:`split_record` per split.
        fps: frames per second.
        split_ids: frame ids of each split; default consecutive with a gap of one between splits.
        windows: (first, last) frame ids of captioned windows, inclusive.
    """
    if split_ids is None:
        split_ids, first = [], 0
        for record in records:
            split_ids.append(list(range(first, first + len(record["quats"]))))
            first += len(record["quats"]) + 1
    info = {"scene_name": scene_id(path), "split_num": len(records), "split": [list(ids) for ids in split_ids]}
    members = {"split_info.json": json.dumps(info).encode(), "fps.txt": f"FPS: {fps}\nTime: 0.0\n".encode()}
    members |= {f"camera/split_{index}.json": json.dumps(record).encode() for index, record in enumerate(records)}
    members |= {f"text/{first}_{last}.json": b"{}" for first, last in windows}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    # An explicit mtime keeps the gzip header, and with it the bytes, independent of the clock.
    atomic_write_bytes(path, gzip.compress(buffer.getvalue(), compresslevel=6, mtime=0))
