"""What to fetch for some hours of a published data set, from its table alone; nothing is downloaded.

Two kinds of table are known by their contents. Of clips (Sekai, OmniWorld-CityWalk) a row names a clip
``{video id}_{first}_{end}``, frames of the video at 30 a second. Of scenes (OmniWorld-Game) a row has a ``UID`` of
twelve hexadecimal digits and a number of images.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Literal

from geoalign.data.tables import Table, read_table, write_csv
from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_write_text

FETCH_FILE, TABLE_FILE = "fetch.txt", "metadata.csv"
_CLIP = re.compile(r"(?P<video>.+)_(?P<first>[0-9]{1,12})_(?P<end>[0-9]{1,12})")
_SCENE = re.compile(r"[0-9a-f]{12}")
_CLIP_FPS, _SCENE_FPS = 30.0, 24.0
_IMAGES = ("Total Img Num", "Img Num")
_CLIP_GB_PER_HOUR, _SCENE_GB = 2.0, 0.0085
"""600 GB in 304 hours of Sekai-Real-Walking-HQ; 2 to 15 MB a camera archive."""


@dataclass(frozen=True, slots=True)
class Item:
    """A clip or a scene of a table.

    Attributes:
        name: of the clip, or the scene's UID.
        source: what is fetched as a whole: the video it is cut from, or the scene.
        seconds: how long it is.
        row: its cells by column.
    """

    name: str
    source: str
    seconds: float
    row: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Subset:
    """Chosen items of a table.

    Attributes:
        kind: clips of videos, or scenes with camera archives.
        items: in the order in which they were chosen.
        columns: of the table.
        left_out: rows that name neither, or what an earlier row names.
        misfits: (line, cause) of the rows of the first table that do not fit it.
    """

    kind: Literal["clips", "scenes"]
    items: tuple[Item, ...]
    columns: tuple[str, ...]
    left_out: int
    misfits: tuple[tuple[int, str], ...] = ()

    @property
    def sources(self) -> list[str]:
        """Videos or scenes, each once, in order."""
        return list(dict.fromkeys(item.source for item in self.items))

    @property
    def hours(self) -> float:
        """Length of all items together."""
        return sum(item.seconds for item in self.items) / 3600

    @property
    def gigabytes(self) -> float:
        """About what the items take on the disk, by the published sizes of the whole set."""
        return self.hours * _CLIP_GB_PER_HOUR if self.kind == "clips" else len(self.items) * _SCENE_GB

    def write(self, folder: Path) -> list[Path]:
        """Write the list of what to fetch, and of clips the table of those chosen, which training reads.

        Raises:
            UsageError: the folder has a table that no earlier subset wrote.
            RunError: nothing can be written.
        """
        if self.kind == "clips":
            if (folder / TABLE_FILE).exists() and not (folder / FETCH_FILE).exists():
                raise UsageError(f"{folder / TABLE_FILE}: no earlier subset wrote this table; choose another --out")
            lines = [f"https://www.youtube.com/watch?v={source}" for source in self.sources]
        else:
            lines = [f"annotations/OmniWorld-Game/{uid}/{uid}_others.tar.gz" for uid in self.sources]
        atomic_write_text(folder / FETCH_FILE, "".join(f"{line}\n" for line in lines))  # first: it marks the folder
        if self.kind == "clips":
            write_csv(folder / TABLE_FILE, self.columns, [item.row for item in self.items])
        return [folder / FETCH_FILE, *([folder / TABLE_FILE] if self.kind == "clips" else [])]


def choose(tables: Sequence[Path], hours: float, seed: int = 0) -> Subset:
    """Whole videos (or scenes), in an order that ``seed`` shuffles, until they hold ``hours``.

    Whole videos, because each must be fetched whole to cut a clip from it. The order of one seed does not depend on the
    hours: a larger subset contains a smaller one.

    Args:
        tables: csv or jsonl; of several, clips that all of them list, with the cells of the first.
        hours: of video to reach; all there is if there is less.

    Raises:
        DataError: a table cannot be read, or names neither clips nor scenes.
    """
    first, *others = (read_table(path) for path in tables)
    kind, items = _items(first, tables[0])
    unique = {item.name: item for item in reversed(items)}  # the first of equal names
    left_out, items = len(first.rows) - len(unique), list(unique.values())
    for table, path in zip(others, tables[1:], strict=True):
        listed = {item.name for item in _items(table, path)[1]}
        items = [item for item in items if item.name in listed]
    order = sorted(items, key=lambda item: (_drawn(seed, item.source), item.name))
    return Subset(kind, tuple(_until(order, 3600 * hours)), first.columns, left_out, first.misfits)


def _until(order: Sequence[Item], seconds: float) -> Iterator[Item]:
    total, source = 0.0, ""
    for item in order:
        if total >= seconds and item.source != source:
            return
        yield item
        total, source = total + item.seconds, item.source


def _drawn(seed: int, source: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{source}".encode("utf-8", "surrogateescape")).digest()


def _items(table: Table, path: Path) -> tuple[Literal["clips", "scenes"], list[Item]]:
    """The kind of the table and its items: the first column that names one in most rows decides."""
    for column in table.columns:
        values = [PureWindowsPath(row.values.get(column, "")).stem for row in table.rows]
        if 2 * sum(_CLIP.fullmatch(value) is not None for value in values) > len(values):
            matches = [(_CLIP.fullmatch(value), row) for value, row in zip(values, table.rows, strict=True)]
            clips = [
                Item(found[0], found["video"], (int(found["end"]) - int(found["first"])) / _CLIP_FPS, row.values)
                for found, row in matches
                if found and int(found["end"]) > int(found["first"])
            ]
            return "clips", clips
    scenes = [row.values for row in table.rows if _SCENE.fullmatch(row.values.get("UID", ""))]
    if not scenes:
        raise DataError(f"{path}: names neither clips (VIDEO_FIRST_END in a column) nor scenes (UID of 12 digits)")
    return "scenes", [Item(row["UID"], row["UID"], _scene_seconds(row), row) for row in scenes]


def _scene_seconds(row: Mapping[str, str]) -> float:
    images = next((row[name] for name in _IMAGES if name in row), "")
    return _positive(images, 0.0) / _positive(row.get("FPS", ""), _SCENE_FPS)


def _positive(text: str, other: float) -> float:
    """The number, or ``other`` where there is none above 0."""
    try:
        value = float(text)
    except ValueError:
        return other
    return value if 0 < value < math.inf else other
