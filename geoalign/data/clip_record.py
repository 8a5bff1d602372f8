"""What one conditioning clip is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"})


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One conditioning clip on disk.

    Attributes:
        clip_id: unique name (file stem, or path below the root where stems are not unique; folder of a frame sequence).
        video_id: name of the video it was cut from; the unit of the train/val split.
        path: video file, or folder of images.
        caption: text of the table, "" if none.
        camera: camera file, ``FILE#CAMERA`` where it holds several, None if none.
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
