"""Which cases a benchmark has: methods x clips x paths x speeds, each with a name that all of it is a function of."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoalign.data.clip_record import VIDEO_SUFFIXES
from geoalign.data.folders import visible
from geoalign.errors import UsageError
from geoalign.geometry.cameras.door import split_name
from geoalign.geometry.cameras.options import parse_choice
from geoalign.geometry.presets import PRESETS

_NAMED = re.compile(r"(?P<clip>.+)_camera_(?P<path>.+?)_speed_(?P<speed>[0-9]+(?:\.[0-9]+)?)")
_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_TRAJECTORY = "trajectory.json"
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True, slots=True, order=True)
class Condition:
    """What a retake is asked for, by whichever method.

    Attributes:
        clip: plain name of the source clip.
        path: a preset, or the file of a camera path.
        speed: factor of its motion per frame.
    """

    clip: str
    path: str
    speed: float

    @property
    def path_name(self) -> str:
        """The path as tables print it: the preset, or the file's name without its suffix; that of the folder of a
        ``trajectory.json``, as Redirect4D-Bench calls the file of every path. A camera chosen of a file follows."""
        if self.path in PRESETS:
            return self.path
        file, choice = split_name(self.path)
        stem = file.parent.name if file.name == _TRAJECTORY else file.stem
        return plain(f"{stem}_{parse_choice(choice)[0]}")

    @property
    def name(self) -> str:
        """The published naming ``CLIP_camera_K_speed_S``, K from 1 to 10 for the published presets."""
        number = PRESETS.index(self.path) + 1 if self.path in PRESETS else self.path_name
        return f"{self.clip}_camera_{number}_speed_{self.speed:g}"

    @property
    def noise_row(self) -> int:
        """The row of the initial noise, 31 bits: a hash of the name, so that no other case has a say in it."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One retake: a condition and the method that answers it."""

    method: str
    condition: Condition

    @property
    def name(self) -> str:
        """As :attr:`geoalign.benchmark.records.CaseFiles.name`."""
        return f"{self.method}__{self.condition.name}"

    def file(self, folder: Path, suffix: str) -> Path:
        """Where a file of this case lies: ``folder/METHOD/CONDITION`` and the suffix."""
        return folder / self.method / f"{self.condition.name}{suffix}"


def plain(name: str) -> str:
    """``name`` with everything that does not belong into a file name replaced by ``_``."""
    return _NOT_PLAIN.sub("_", name).strip("_") or "clip"


def check_method(name: str) -> str:
    """``name`` if it may name a method, and its folder; raises UsageError."""
    if not _METHOD.fullmatch(name):
        raise UsageError(f"method {name!r}: use letters, digits and . + - only, beginning with a letter or digit")
    return name


def conditions(paths: Mapping[str, Sequence[str]], speeds: Sequence[float]) -> list[Condition]:
    """All conditions of the paths of each clip, clip by clip, in a fixed order.

    Raises:
        UsageError: two of them would have one name (two camera files of one name, a speed given twice).
    """
    found = [Condition(clip, path, speed) for clip, own in paths.items() for path in own for speed in speeds]
    names = Counter(item.name for item in found)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise UsageError(
            f"two cases are called {twice}: give every clip, camera file and speed a name of its own, once"
        )
    return found


def find_videos(folder: Path) -> dict[tuple[str, str, str], Path]:
    """The videos in the published naming in ``folder``, by clip, camera and speed as :attr:`Condition.name` has them.

    Raises:
        UsageError: there is no such folder, no such video in it, or two of one clip, camera and speed.
    """
    if not folder.is_dir():
        raise UsageError(f"--videos {folder}: no such folder")
    found: dict[tuple[str, str, str], Path] = {}
    for file in visible(folder.iterdir()):
        named = _NAMED.fullmatch(file.stem)
        if named and file.suffix.lower() in VIDEO_SUFFIXES:
            key = named["clip"], named["path"], f"{float(named['speed']):g}"
            if key in found:
                raise UsageError(_two(found[key], file))
            found[key] = file
    if not found:
        raise UsageError(
            f"--videos {folder}: no video called CLIP_camera_K_speed_S.mp4 (K from 1 to 10, or a path's name)"
        )
    return found


def video_of(videos: dict[tuple[str, str, str], Path], condition: Condition) -> Path | None:
    """The video of a condition: by the number of a published preset or by the path's name; None if there is none.

    Raises UsageError where there are both.
    """
    cameras = [condition.path_name]
    if condition.path in PRESETS:
        cameras.append(str(PRESETS.index(condition.path) + 1))
    keys = ((condition.clip, camera, f"{condition.speed:g}") for camera in cameras)
    found = [videos[key] for key in keys if key in videos]
    if len(found) > 1:
        raise UsageError(_two(*found))
    return found[0] if found else None


def _two(first: Path, second: Path) -> str:
    return f"--videos {first.parent}: {first.name} and {second.name} are of one case; remove one"


def shard(cases: Sequence[Case], rank: int, size: int) -> list[Case]:
    """The share of process ``rank`` of ``size``: every ``size``-th case, wherever an earlier run stopped."""
    return list(cases[rank::size])
