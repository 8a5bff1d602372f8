"""Folders of video clips with a table: Sekai-Real-Walking-HQ, OmniWorld-CityWalk, or any folder of mp4.

The published layout is ``files/{video_id}/{video_id}_{start}_{end}.mp4`` with a csv whose columns are ``videoFile,
cameraFile, caption, location, scene, crowdDensity, weather, timeOfDay``; start and end are frame numbers of the source
video, not of the clip. Rows whose file is missing are normal (videos vanish from YouTube) and are counted. Camera files
hold ``extrinsic`` (camera-to-world, OpenCV) and ``intrinsic`` (pixels); the published ones are scale-free.
Source: huggingface.co/datasets/Lixsp11/Sekai-Project, huggingface.co/datasets/InternRobotics/OmniWorld.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PureWindowsPath

from geoalign.data.clip_record import VIDEO_SUFFIXES, ClipRecord, youtube_id
from geoalign.data.folders import is_visible, visible, walk
from geoalign.data.tables import Row, Table, read_table, write_csv
from geoalign.data.tally import Tally
from geoalign.errors import DataError
from geoalign.geometry.cameras.door import CAMERA_SUFFIXES, split_name

COLUMNS = ("videoFile", "cameraFile", "caption", "location", "scene", "crowdDensity", "weather", "timeOfDay")
"""Columns of the published table, in order."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "videoFile", "file_name", "video", "video_path"),
    "caption": ("caption", "text", "prompt", "Video_Caption"),
    "camera": ("camera", "cameraFile"),
    "start_frame": ("start_frame",),
    "end_frame": ("end_frame",),
}
"""Canonical column -> accepted names, first match wins."""

_KNOWN = frozenset(name for names in ALIASES.values() for name in names)
_Row = tuple[dict[str, str], dict[str, str]]  # by ``ALIASES``, and as it is


def find_tables(root: Path, metadata: Path | None) -> list[Path]:
    """Tables of ``root``: the configured one (must exist), else ``metadata.csv`` or ``.jsonl``, else every csv."""
    if metadata is not None:
        path = root / metadata
        if not path.is_file():
            raise DataError(f"{path}: no such table (data.clips.metadata)")
        return [path]
    for name in ("metadata.csv", "metadata.jsonl"):
        if (root / name).is_file():
            return [root / name]
    return visible(root.glob("*.csv"))


def list_video_clips(root: Path, tables: list[Path], tally: Tally) -> list[ClipRecord]:
    """Records of a folder of videos, from its table or (without one) from the files found under it.

    Raises:
        DataError: several tables, or one that cannot be read.
    """
    index = _FileIndex(root)
    if len(tables) > 1:
        found = ", ".join(table.name for table in tables)
        raise DataError(f"{root}: several tables ({found}); name one in data.clips.metadata")
    table = read_table(tables[0]) if tables else _table_of(index.videos(), root)
    for line, cause in table.misfits:
        tally.reject(f"line {line}", cause)
    if table.rows and not any(name in table.columns for name in ALIASES["path"]):
        raise DataError(
            f"{tables[0]}: no column with file names; expected one of {ALIASES['path']}, got {list(table.columns)}"
        )
    listed = _listed_files(table, index, tally)
    records = []
    for (clip_id, video_id), (path, (values, row)) in zip(clip_names(listed, root), listed.items(), strict=True):
        bounds = _bounds(values["start_frame"], values["end_frame"])
        if bounds is None:
            tally.reject(clip_id, "bad start_frame or end_frame")
            continue
        camera = index.camera(values["camera"], path, anywhere=clip_id == path.stem)
        extra = {key: value for key, value in row.items() if key not in _KNOWN}
        records.append(ClipRecord(clip_id, video_id, path, values["caption"], camera, *bounds, extra))
    return records


def _table_of(videos: list[Path], root: Path) -> Table:
    rows = (Row(number, {"path": file.relative_to(root).as_posix()}) for number, file in enumerate(videos, start=1))
    return Table(("path",), tuple(rows), ())


def _listed_files(table: Table, index: _FileIndex, tally: Tally) -> dict[Path, _Row]:
    """The file of each row that has one, with the row by ``ALIASES`` and as it is; a file counts once."""
    named = []
    for row in table.rows:
        if row.nested & _KNOWN:
            tally.reject(f"line {row.line}", f"{min(row.nested & _KNOWN)} is a list or an object")
            continue
        values = {
            key: next((row.values[name] for name in names if name in row.values), "") for key, names in ALIASES.items()
        }
        named.append((values, row))
    uses = Counter(Path(name).name for name in {values["path"] for values, _ in named})
    listed: dict[Path, tuple[Path, _Row]] = {}
    for values, row in named:
        if not (name := values["path"]):
            tally.reject(f"line {row.line}", "row without a file name")
            continue
        if not is_visible(PureWindowsPath(name)):
            tally.reject(name, "hidden or temporary file")
            continue
        files = index.find(name, VIDEO_SUFFIXES, ".mp4", anywhere=uses[Path(name).name] == 1)
        if len(files) != 1:
            tally.reject(name, "several files of this name" if files else "missing file")
        elif listed.setdefault(files[0].resolve(), (files[0], (values, row.values)))[1][1] is not row.values:
            tally.remarks["listed twice, first row kept"] += 1
    return dict(listed.values())


def clip_names(paths: Iterable[Path], root: Path) -> list[tuple[str, str]]:
    """(clip id, video id) of each file: the stem and the video in it, as far as stems are unique.

    Files of equal stem (``scene0/videos/cam00.mp4``, ``scene1/videos/cam00.mp4``) are called by their path below
    ``root``, and their video is their folder: the cameras of a scene stay on one side of the train/val split.
    """
    paths = [path.relative_to(root) if path.is_relative_to(root) else path for path in paths]
    stems = Counter(path.stem for path in paths)
    short = Counter(path.with_suffix("") for path in paths)
    names = []
    for path in paths:
        stem = path.stem
        if stems[stem] == 1:
            names.append((stem, youtube_id(stem)))
            continue
        name = path if short[path.with_suffix("")] > 1 else path.with_suffix("")
        video = youtube_id(stem)
        names.append((name.as_posix(), path.parent.as_posix() if video == stem else video))
    return names


def _bounds(start: str, end: str) -> tuple[int, int | None] | None:
    try:
        numbers = float(start or 0), float(end) if end else None
        first, last = (None if number is None else int(number) for number in numbers)
    except (ValueError, OverflowError):
        return None
    if first is None or (first, last) != numbers:  # half a frame
        return None
    return (first, last) if first >= 0 and (last is None or last > first) else None


class _FileIndex:
    """Finds the files of a table: at the named place, at the published places, else by name anywhere under the root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, list[Path]] | None = None

    def videos(self) -> list[Path]:
        found = (path for paths in self._by_name().values() for path in paths)
        return sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES)

    def find(
        self, name: str, suffixes: Collection[str], suffix: str, *, anywhere: bool, beside: Path | None = None
    ) -> list[Path]:
        """All files that ``name`` may mean; ``suffix`` is added unless it has one of ``suffixes``.

        ``anywhere``: a file of that name in any other folder will do. Otherwise its last folders must be those named.
        """
        relative = Path(name) if Path(name).suffix.lower() in suffixes else Path(f"{name}{suffix}")
        video_id = youtube_id(relative.stem)
        places = [self._root / relative, self._root / video_id / relative, self._root / "files" / video_id / relative]
        for place in [beside / relative.name, *places] if beside else places:
            if place.is_file():
                return [place]
        if "\\" in name:  # of a table that was written on Windows
            return self.find(PureWindowsPath(name).as_posix(), suffixes, suffix, anywhere=anywhere, beside=beside)
        files, depth = self._by_name().get(relative.name, []), len(relative.parts)
        fitting = [file for file in files if depth > 1 and file.parts[-depth:] == relative.parts]
        return fitting or (files if anywhere else [])

    def camera(self, name: str, video: Path, *, anywhere: bool) -> Path | None:
        """The camera ``name`` (a file, or ``FILE#CAMERA``) of a clip, else the npz that is called like ``video``."""
        file, camera = split_name(name)
        for wanted in (file if name else None, video.with_suffix(".npz").name):
            if wanted is None:
                continue
            files = self.find(str(wanted), CAMERA_SUFFIXES, ".npz", anywhere=anywhere, beside=video.parent)
            if len(files) == 1:
                return files[0].with_name(f"{files[0].name}#{camera}") if camera and wanted is file else files[0]
        return None

    def _by_name(self) -> dict[str, list[Path]]:
        if self._files is None:
            self._files = {}
            for path in walk(self._root):
                if path.is_file():
                    self._files.setdefault(path.name, []).append(path)
        return self._files


def write_metadata(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write the published csv (``COLUMNS``, plus any further keys of the rows as columns at the end)."""
    rows = list(rows)
    further = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    write_csv(path, [*COLUMNS, *further], rows)
