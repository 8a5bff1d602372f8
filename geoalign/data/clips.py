"""Listing conditioning clips from any of the accepted layouts, and the split between training and validation."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from geoalign.config.data import ClipsConfig
from geoalign.data.citywalk import find_tables, list_video_clips
from geoalign.data.clip_record import VIDEO_SUFFIXES, ClipRecord
from geoalign.data.folders import is_visible, walk
from geoalign.data.tally import Tally
from geoalign.errors import DataError
from geoalign.files.parsing import read_text

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
Split = Literal["train", "val", "all"]


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


def is_frame(file: Path) -> bool:
    """Whether a file of a folder is one of its frames: an image, neither hidden (``._0001.jpg``) nor temporary."""
    return file.suffix.lower() in IMAGE_SUFFIXES and is_visible(file)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which ``frame2`` comes before ``frame10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def list_clips(root: Path, config: ClipsConfig, tally: Tally) -> list[ClipRecord]:
    """List the clips under ``root`` in a fixed order (by clip id); unusable rows go to ``tally``.

    Only names are looked at here: whether a clip decodes shows when it is first read.

    Raises:
        DataError: ``root`` is not a folder, its table cannot be read, or nothing usable is in it.
    """
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


def read_clip_list(file: Path) -> list[str]:
    """The names in a list of clips; empty lines and what follows ``#`` are left out. Raises DataError for none."""
    names = [line for text in read_text(file).split("\n") if (line := text.partition("#")[0].strip())]
    if not names:
        raise DataError(f"{file}: no name of a clip in it")
    return names


def _guess_layout(root: Path, tables: list[Path]) -> Literal["videos", "frames", "davis"]:
    if (root / "JPEGImages").is_dir():
        return "davis"
    if len(tables) == 1 or any(file.suffix.lower() in VIDEO_SUFFIXES for file in walk(root)):
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
    for folder in (path for path in walk(root) if path.is_dir()):
        if any(is_frame(file) for file in folder.iterdir()):
            name = folder.relative_to(root).as_posix()
            camera = folder.with_suffix(".npz")
            records.append(ClipRecord(name, name, folder, camera=camera if camera.is_file() else None))
        elif not any(child.is_dir() and is_visible(child) for child in folder.iterdir()):
            tally.reject(folder.relative_to(root).as_posix(), "folder without images")
    return records
