"""Writes the embedded world in the published formats of the real data, for the ordinary loaders to read.

Clips: ``files/{id}/{id}_{start}_{end}.mp4`` with a metadata csv and one camera file each (Sekai, OmniWorld-CityWalk).
Target paths: ``{uid}_others.tar.gz`` archives (OmniWorld-Game: world-to-camera, scalar-first quaternions). Clips and
paths come from different draws: reinforcement learning never sees a pair.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from geoalign.config.data import DataConfig
from geoalign.config.world import WorldConfig
from geoalign.data.citywalk import write_metadata
from geoalign.data.omniworld import ARCHIVE_SUFFIX, split_record, write_archive
from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.io_utils import atomic_write_json, is_temporary
from geoalign.locks import LOCK_NAME, writer_lock
from geoalign.world.motion import ground_plane, random_curves, source_drift, to_c2w
from geoalign.world.pairs import PROMPT
from geoalign.world.render import intrinsics, render
from geoalign.world.scene import sample_scenes

_STAMP, _UNFINISHED = "world.json", ".writing"
_CHUNK, _SPLITS_PER_ARCHIVE = 64, 64


def _fingerprint(world: WorldConfig) -> str:
    return hashlib.sha256(json.dumps(world.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


def is_complete(data: DataConfig, world: WorldConfig) -> bool:
    """Whether ``data.root`` holds exactly this world, completely written, and no file of it is gone or empty."""
    try:
        stamp = json.loads((data.root / _STAMP).read_text())
        return stamp["fingerprint"] == _fingerprint(world) and all(
            (data.root / file).stat().st_size > 0 for file in stamp["files"]
        )
    except (OSError, ValueError, KeyError, TypeError):  # write_world says what is wrong with a damaged stamp
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
    _earlier_files(data.root)  # a folder that is not ours gets no lock either
    with writer_lock(data.root, "world"):
        if not is_complete(data, world):  # by another process, in the meantime
            _render_all(data, world, progress)


def _render_all(data: DataConfig, world: WorldConfig, progress: Callable[[int], object]) -> None:
    root = data.root
    stamp, unfinished = root / _STAMP, root / _UNFINISHED
    earlier = _earlier_files(root)
    clips, archives = _clip_files(data, world), _archive_files(data, world)
    listed = [data.clips_path / "metadata.csv", *archives, *clips, *(clip.with_suffix(".npz") for clip in clips)]
    files = [str(file.relative_to(root) if file.is_relative_to(root) else file) for file in listed]
    atomic_write_json(unfinished, {"files": sorted({*earlier, *files})})  # a killed run leaves no file unlisted
    stamp.unlink(missing_ok=True)
    _delete(root, earlier)
    _write_paths(archives, world)
    _write_clips(data, clips, world, progress)
    settings = world.model_dump(mode="json")
    atomic_write_json(stamp, {"fingerprint": _fingerprint(world), "settings": settings, "files": files})
    unfinished.unlink()


def _earlier_files(root: Path) -> list[str]:
    """Files that earlier renders wrote, finished or not; relative to ``root`` where they lie inside."""
    stamps = [stamp for name in (_STAMP, _UNFINISHED) if (stamp := root / name).exists()]
    if not stamps and root.exists() and any(not _is_of_a_writer(file) for file in root.iterdir()):
        raise DataError(f"{root}: not empty and not an embedded world; choose another data.root or empty the folder")
    try:
        return sorted({file for stamp in stamps for file in json.loads(stamp.read_text())["files"]})
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{root}: its stamp does not list the files of the world in it; empty the folder") from None


def _is_of_a_writer(file: Path) -> bool:
    """Whether it is what a render that was killed before its first stamp leaves in an empty folder."""
    return is_temporary(file) or file.name == LOCK_NAME


def _delete(root: Path, files: list[str]) -> None:
    """Delete ``files`` and the folders that are empty without them."""
    for file in files:
        (root / file).unlink(missing_ok=True)
    for folder in sorted({parent for file in files for parent in Path(file).parents[:-1]}, reverse=True):
        with contextlib.suppress(OSError):  # holds other files, or is gone
            (root / folder).rmdir()


def _clip_files(data: DataConfig, world: WorldConfig) -> list[Path]:
    names = [f"drone{number:05d}" for number in range(world.clips)]
    return [data.clips_path / "files" / name / f"{name}_{0:07d}_{world.frames:07d}.mp4" for name in names]


def _archive_files(data: DataConfig, world: WorldConfig) -> list[Path]:
    uids = [f"{number:012x}" for number in range(-(-world.trajectories // _SPLITS_PER_ARCHIVE))]
    return [data.trajectories_path / uid / f"{uid}{ARCHIVE_SUFFIX}" for uid in uids]


def _write_clips(data: DataConfig, clips: list[Path], world: WorldConfig, progress: Callable[[int], object]) -> None:
    generator = torch.Generator().manual_seed(world.seed + 101)
    low, high = world.height_m
    rows = []
    for start in range(0, len(clips), _CHUNK):
        chunk = clips[start : start + _CHUNK]
        count = len(chunk)
        height = low + (high - low) * torch.rand(count, generator=generator)
        scenes = sample_scenes(count, generator, style="real")
        c2w = to_c2w(source_drift(count, world.frames, generator), world)
        plane = ground_plane(world, height)
        videos = render(scenes, c2w, plane, world)
        for i, file in enumerate(chunk):
            write_video(file, videos[i], world.fps, lossless=True)
            camera, name = CameraTrajectory.build(c2w[i], intrinsics(world)), file.with_suffix(".npz")
            write_clip_camera(name, camera, (world.height, world.width), ground_plane=plane[i])
            rows.append({"videoFile": file.name, "cameraFile": name.name, "caption": PROMPT, "scene": "landscape"})
        progress(count)
    write_metadata(data.clips_path / "metadata.csv", rows)


def _write_paths(archives: list[Path], world: WorldConfig) -> None:
    generator = torch.Generator().manual_seed(world.seed + 202)
    c2w = to_c2w(random_curves(world.trajectories, world.frames, generator), world)
    for file, some in zip(archives, c2w.split(_SPLITS_PER_ARCHIVE), strict=True):
        paths = [CameraTrajectory.build(poses, intrinsics(world)) for poses in some]
        write_archive(
            file, [split_record(path, image_size=(world.height, world.width)) for path in paths], fps=world.fps
        )
