"""Clip records: what one conditioning clip is, and listing them from any of the accepted layouts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from geoalign.config.data import ClipsConfig
from geoalign.data.tally import Tally
from geoalign.errors import DataError

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
Split = Literal["train", "val", "all"]


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One conditioning clip on disk.

    Attributes:
        clip_id: unique name (file stem, or path below the root where stems are not unique; folder of a frame sequence).
        video_id: name of the video it was cut from; the unit of the train/val split.
        path: video file, or folder of images.
        caption: text of the table, "" if none.
        camera: camera file, None if none.
        start_frame: first usable frame in the file.
        end_frame: end of the usable frames in the file (exclusive), None for the end of the file.
        extra: further columns of the table, passed through.
    """

    clip_id: str
    video_id: str
    path: Path
    caption: str = ""
    camera: Path | None = None
    start_frame: int = 0
    end_frame: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


def youtube_id(stem: str) -> str:
    """The video id in a clip name ``{id}_{start}_{end}`` (ids may hold ``_`` and ``-``); other names are their own."""
    match = re.fullmatch(r"(.+)_\d+_\d+", stem)
    return match[1] if match else stem


def is_held_out(name: str, fraction: float) -> bool:
    """Whether ``name`` belongs to validation: a hash, so adding data never moves other names."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_split(record: ClipRecord, split: Split, val_fraction: float) -> bool:
    """Whether ``record`` belongs to ``split``: its ``split`` column if it has one, else the hash of its video id."""
    if split == "all":
        return True
    stated = record.extra.get("split", "").lower()
    held_out = (
        stated in ("val", "valid", "validation", "test") if stated else is_held_out(record.video_id, val_fraction)
    )
    return held_out == (split == "val")


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which ``frame2`` comes before ``frame10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def list_clips(root: Path, config: ClipsConfig, tally: Tally) -> list[ClipRecord]:
    """List the clips under ``root`` in a fixed order (by clip id); unusable rows go to ``tally``.

    Only names are looked at here: whether a clip decodes shows when it is first read.

    Raises:
        DataError: ``root`` is not a folder, its table cannot be read, or nothing usable is in it.
    """
    from geoalign.data.citywalk import find_tables, list_video_clips

    if not root.is_dir():
        raise DataError(f"{root}: no such folder of clips; set data.root and data.clips.path")
    tables = find_tables(root, config.metadata)
    layout = config.layout if config.layout != "auto" else _guess_layout(root, tables)
    if layout == "videos":
        records = list_video_clips(root, tables, tally)
    else:
        records = _list_frame_folders(root / "JPEGImages" if layout == "davis" else root, layout == "davis", tally)
    if not records:
        raise DataError(f"{root}: no usable clips (layout {layout})\n{tally.summary()}")
    tally.accepted += len(records)
    return sorted(records, key=lambda record: record.clip_id)


def _guess_layout(root: Path, tables: list[Path]) -> Literal["videos", "frames", "davis"]:
    if (root / "JPEGImages").is_dir():
        return "davis"
    if len(tables) == 1 or any(file.suffix.lower() in VIDEO_SUFFIXES for file in root.rglob("*")):
        return "videos"
    return "frames"


def _list_frame_folders(root: Path, davis: bool, tally: Tally) -> list[ClipRecord]:
    """One clip per folder with images; of DAVIS the best resolution on disk (Full-Resolution, 1080p, then 480p)."""
    if davis:
        found = [root / name for name in ("Full-Resolution", "1080p", "480p") if (root / name).is_dir()]
        if not found:
            raise DataError(f"{root}: expected a folder 480p, 1080p or Full-Resolution of a DAVIS data set")
        root = found[0]
    records = []
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()):
            name = folder.relative_to(root).as_posix()
            camera = folder.with_suffix(".npz")
            records.append(ClipRecord(name, name, folder, camera=camera if camera.is_file() else None))
        elif not any(child.is_dir() for child in folder.iterdir()):
            tally.reject(folder.relative_to(root).as_posix(), "folder without images")
    return records
