"""Writes the embedded world in the published formats of the real data, for the ordinary loaders to read.

Clips: ``files/{id}/{id}_{start}_{end}.mp4`` with a metadata csv and one camera file each (Sekai, OmniWorld-CityWalk).
Target paths: ``{uid}_others.tar.gz`` archives (OmniWorld-Game: world-to-camera, scalar-first quaternions). Clips and
paths come from different draws: reinforcement learning never sees a pair.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from geoalign.config.data import DataConfig
from geoalign.config.world import WorldConfig
from geoalign.data.citywalk import write_metadata
from geoalign.data.omniworld import ARCHIVE_SUFFIX, split_record, write_archive
from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.files.atomic import atomic_write_json, is_temporary, remove_leftovers
from geoalign.files.locks import LOCK_NAME, writer_lock
from geoalign.files.parsing import read_json_object
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.world.motion import ground_plane, random_curves, source_drift, to_c2w
from geoalign.world.pairs import PROMPT
from geoalign.world.render import intrinsics, render
from geoalign.world.scene import Scene, sample_scenes

_STAMP, _UNFINISHED = "world.json", ".writing"
_CHUNK, _SPLITS_PER_ARCHIVE = 64, 64
_WRITERS = 2  # threads beside the one that renders; they wait for the disk half of the time
_WRITTEN = re.compile(
    rf"/(metadata\.csv|files/(drone\d+)/\2_\d+_\d+\.(mp4|npz)|([0-9a-f]{{12,}})/\4{re.escape(ARCHIVE_SUFFIX)})$"
)
"""The files of a world, wherever ``data.clips.path`` and ``data.trajectories.path`` put them."""


def _fingerprint(world: WorldConfig) -> str:
    return hashlib.sha256(json.dumps(world.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


def is_complete(data: DataConfig, world: WorldConfig) -> bool:
    """Whether ``data.root`` holds exactly this world, completely written, and no file of it is gone or empty."""
    try:
        stamp = read_json_object(data.root / _STAMP)
        return stamp["fingerprint"] == _fingerprint(world) and all(
            (data.root / file).stat().st_size > 0 for file in stamp["files"]
        )
    except (DataError, OSError, ValueError, KeyError, TypeError):  # write_world says what is wrong with a stamp
        return False


def write_world(data: DataConfig, world: WorldConfig, progress: Callable[[int], object] = lambda count: None) -> None:
    """Render clips and camera archives into ``data.root``; a stamp is written last, so a killed run starts over.

    The files of an earlier render, which its stamp lists, are deleted first; all others in the folder stay.

    Args:
        data: where to write.
        world: what to render; equal settings give equal bytes.
        progress: called with the number of clips done since the last call.

    Raises:
        DataError: the folder holds another data set, which is never overwritten.
        UsageError: another process is rendering there.
    """
    _earlier_files(data)  # a folder that is not ours gets no lock either
    with writer_lock(data.root, "world"):
        remove_leftovers(data.root)
        if is_complete(data, world):  # by another process in the meantime, or by one that was killed at its very end
            (data.root / _UNFINISHED).unlink(missing_ok=True)
        else:
            _render_all(data, world, progress)


def _render_all(data: DataConfig, world: WorldConfig, progress: Callable[[int], object]) -> None:
    root = data.root
    stamp, unfinished = root / _STAMP, root / _UNFINISHED
    earlier = _earlier_files(data)
    clips, archives = _clip_files(data, world), _archive_files(data, world)
    listed = [data.clips_path / "metadata.csv", *archives, *clips, *(clip.with_suffix(".npz") for clip in clips)]
    files = [str(file.relative_to(root) if file.is_relative_to(root) else file) for file in listed]
    atomic_write_json(unfinished, {"files": sorted({*earlier, *files})})  # a killed run leaves no file unlisted
    stamp.unlink(missing_ok=True)
    _delete(data, earlier)
    _write_paths(archives, world)
    _write_clips(data, clips, world, progress)
    settings = world.model_dump(mode="json")
    atomic_write_json(stamp, {"fingerprint": _fingerprint(world), "settings": settings, "files": files})
    unfinished.unlink()


def _earlier_files(data: DataConfig) -> list[str]:
    """Files that earlier renders wrote, finished or not; relative to ``data.root`` where they lie inside.

    A stamp is a file like any other: what it names is believed only where a world could have written it.
    """
    root = data.root
    stamps = [stamp for name in (_STAMP, _UNFINISHED) if (stamp := root / name).exists()]
    if not stamps and root.exists() and any(not _is_of_a_writer(file) for file in root.iterdir()):
        raise DataError(f"{root}: not empty and not an embedded world; choose another data.root or empty the folder")
    try:
        files = sorted({file for stamp in stamps for file in read_json_object(stamp)["files"]})
        strangers = [file for file in files if _owner(data, file) is None]
    except (DataError, ValueError, KeyError, TypeError):
        raise DataError(f"{root}: its stamp does not list the files of the world in it; empty the folder") from None
    if strangers:
        raise DataError(
            f"{root}: its stamp lists {strangers[0]}, which no world writes or which lies outside of the data; nothing "
            "was deleted; empty the folder yourself"
        )
    return files


def _is_of_a_writer(file: Path) -> bool:
    """Whether it is what a render that was killed before its first stamp leaves in an empty folder."""
    return is_temporary(file) or file.name == LOCK_NAME


def _owner(data: DataConfig, file: str) -> Path | None:
    """The folder of this data set that ``file`` lies in after links are followed, if a world may have written it."""
    path = data.root / file
    if not _WRITTEN.search(path.as_posix()):
        return None
    owners = [folder.resolve() for folder in (data.root, data.clips_path, data.trajectories_path)]
    return next((owner for owner in owners if path.parent.resolve().is_relative_to(owner)), None)


def _delete(data: DataConfig, files: list[str]) -> None:
    """Delete ``files`` and the folders below the owned ones that are empty without them."""
    folders = set()
    for file in files:
        owner, path = _owner(data, file), data.root / file
        if owner is None:
            continue
        path.unlink(missing_ok=True)
        parents = [path.parent.resolve(), *path.parent.resolve().parents]
        folders |= {parent for parent in parents if parent.is_relative_to(owner) and parent != owner}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):  # holds other files, or is gone
            folder.rmdir()


def _clip_files(data: DataConfig, world: WorldConfig) -> list[Path]:
    names = [f"drone{number:05d}" for number in range(world.clips)]
    return [data.clips_path / "files" / name / f"{name}_{0:07d}_{world.frames:07d}.mp4" for name in names]


def _archive_files(data: DataConfig, world: WorldConfig) -> list[Path]:
    uids = [f"{number:012x}" for number in range(-(-world.trajectories // _SPLITS_PER_ARCHIVE))]
    return [data.trajectories_path / uid / f"{uid}{ARCHIVE_SUFFIX}" for uid in uids]


def draw_clips(world: WorldConfig) -> Iterator[tuple[Scene, Tensor, Tensor]]:
    """What the clips show, in their order and some at a time; a function of the settings alone.

    Yields:
        scenes, their cameras ``[B, F, 4, 4]`` (c2w relative to frame 0, metres), their ground planes ``[B, 4]``.
    """
    generator = torch.Generator().manual_seed(world.seed + 101)
    low, high = world.height_m
    for start in range(0, world.clips, _CHUNK):
        count = min(_CHUNK, world.clips - start)
        height = low + (high - low) * torch.rand(count, generator=generator)
        scenes = sample_scenes(count, generator, style="real", streets=world.streets)
        c2w = to_c2w(source_drift(count, world.frames, generator), world)
        yield scenes, c2w, ground_plane(world, height)


def _write_clips(data: DataConfig, clips: list[Path], world: WorldConfig, progress: Callable[[int], object]) -> None:
    """Render chunk by chunk; threads encode and write the clips of one while the next is rendered."""
    files, rows = iter(clips), []

    def write(file: Path, video: Tensor, c2w: Tensor, plane: Tensor) -> None:
        write_video(file, video, world.fps, lossless=True)
        camera = CameraTrajectory.build(c2w, intrinsics(world))
        write_clip_camera(file.with_suffix(".npz"), camera, (world.height, world.width), ground_plane=plane)

    def drain(pending: list[Future[None]]) -> None:
        for done in pending:
            done.result()
            progress(1)

    with ThreadPoolExecutor(_WRITERS) as writers:
        pending: list[Future[None]] = []
        for scenes, c2w, plane in draw_clips(world):
            chunk = list(islice(files, len(c2w)))
            videos = render(scenes, c2w, plane, world)
            drain(pending)
            pending = [writers.submit(write, *of_clip) for of_clip in zip(chunk, videos, c2w, plane, strict=True)]
            for file in chunk:
                camera = file.with_suffix(".npz").name
                rows.append({"videoFile": file.name, "cameraFile": camera, "caption": PROMPT, "scene": "landscape"})
        drain(pending)
    write_metadata(data.clips_path / "metadata.csv", rows)


def _write_paths(archives: list[Path], world: WorldConfig) -> None:
    generator = torch.Generator().manual_seed(world.seed + 202)
    c2w = to_c2w(random_curves(world.trajectories, world.frames, generator), world)
    for file, some in zip(archives, c2w.split(_SPLITS_PER_ARCHIVE), strict=True):
        paths = [CameraTrajectory.build(poses, intrinsics(world)) for poses in some]
        write_archive(
            file, [split_record(path, image_size=(world.height, world.width)) for path in paths], fps=world.fps
        )
