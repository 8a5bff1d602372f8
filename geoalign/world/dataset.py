"""Writes the embedded world in the published formats of the real data, for the ordinary loaders to read.

Clips: ``files/{id}/{id}_{start}_{end}.mp4`` with a metadata csv and one camera file each (Sekai, OmniWorld-CityWalk).
Target paths: ``{uid}_others.tar.gz`` archives (OmniWorld-Game: world-to-camera, scalar-first quaternions). Clips and
paths come from different draws: reinforcement learning never sees a pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch

from geoalign.config.data import DataConfig
from geoalign.config.world import WorldConfig
from geoalign.data.citywalk import write_clip_camera, write_metadata
from geoalign.data.omniworld import split_record, write_archive
from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.io_utils import atomic_write_json
from geoalign.world.motion import ground_plane, random_curves, source_drift, to_c2w
from geoalign.world.pairs import PROMPT
from geoalign.world.render import intrinsics, render
from geoalign.world.scene import sample_scenes

_STAMP = "world.json"
_CHUNK, _SPLITS_PER_ARCHIVE = 64, 64


def _fingerprint(world: WorldConfig) -> str:
    return hashlib.sha256(json.dumps(world.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


def is_complete(data: DataConfig, world: WorldConfig) -> bool:
    """Whether ``data.root`` holds exactly this world, completely written."""
    stamp = data.root / _STAMP
    return stamp.exists() and json.loads(stamp.read_text())["fingerprint"] == _fingerprint(world)


def write_world(data: DataConfig, world: WorldConfig, progress: Callable[[int], object] = lambda count: None) -> None:
    """Render clips and camera archives into ``data.root``; a stamp is written last, so a killed run starts over.

    Args:
        data: where to write.
        world: what to render; equal settings give equal bytes.
        progress: called with the number of clips done since the last call.

    Raises:
        DataError: the folder holds another data set, which is never overwritten.
    """
    root = data.root
    stamp = root / _STAMP
    if root.exists() and any(root.iterdir()) and not stamp.exists() and not (root / ".writing").exists():
        raise DataError(f"{root}: not empty and not an embedded world; choose another data.root or empty the folder")
    stamp.unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    (root / ".writing").touch()
    _write_paths(data, world)
    _write_clips(data, world, progress)
    atomic_write_json(stamp, {"fingerprint": _fingerprint(world), "settings": world.model_dump(mode="json")})
    (root / ".writing").unlink()


def _write_clips(data: DataConfig, world: WorldConfig, progress: Callable[[int], object]) -> None:
    generator = torch.Generator().manual_seed(world.seed + 101)
    low, high = world.height_m
    rows = []
    for start in range(0, world.clips, _CHUNK):
        count = min(_CHUNK, world.clips - start)
        height = low + (high - low) * torch.rand(count, generator=generator)
        scenes = sample_scenes(count, generator, style="real")
        c2w = to_c2w(source_drift(count, world.frames, generator), world)
        plane = ground_plane(world, height)
        videos = render(scenes, c2w, plane, world)
        for i in range(count):
            name = f"drone{start + i:05d}"
            stem = f"{name}_{0:07d}_{world.frames:07d}"
            folder = data.clips_path / "files" / name
            write_video(folder / f"{stem}.mp4", videos[i], world.fps, lossless=True)
            camera = CameraTrajectory.build(c2w[i], intrinsics(world))
            write_clip_camera(folder / f"{stem}.npz", camera, (world.height, world.width), ground_plane=plane[i])
            rows.append(
                {"videoFile": f"{stem}.mp4", "cameraFile": f"{stem}.npz", "caption": PROMPT, "scene": "landscape"}
            )
        progress(count)
    write_metadata(data.clips_path / "metadata.csv", rows)


def _write_paths(data: DataConfig, world: WorldConfig) -> None:
    generator = torch.Generator().manual_seed(world.seed + 202)
    c2w = to_c2w(random_curves(world.trajectories, world.frames, generator), world)
    for number, start in enumerate(range(0, world.trajectories, _SPLITS_PER_ARCHIVE)):
        paths = [CameraTrajectory.build(poses, intrinsics(world)) for poses in c2w[start : start + _SPLITS_PER_ARCHIVE]]
        records = [split_record(path, image_size=(world.height, world.width)) for path in paths]
        uid = f"{number:012x}"
        write_archive(data.trajectories_path / uid / f"{uid}_others.tar.gz", records, fps=world.fps)
