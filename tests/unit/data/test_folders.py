"""What counts as data in a folder: links are followed, circles end, hidden and temporary files do not count."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geoalign.config.data import ClipsConfig, DataConfig, TrajectoriesConfig
from geoalign.data.cache import CacheFolder, content_hash, open_cache, settings_hash, window_key
from geoalign.data.captions import CLEANING_VERSION
from geoalign.data.clip_record import ClipRecord
from geoalign.data.clips import list_clips
from geoalign.data.folders import is_visible, walk
from geoalign.data.prepare import data_settings
from geoalign.data.tally import Tally
from geoalign.data.trajectories import load_pool


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.mp4", True), ("part.mp4", True), ("a.parted.mp4", True), ("temp.mp4", True), ("10.tmpfs.png", True),
        ("._a.mp4", False), (".a.mp4.X1y2", False), ("a.mp4.part", False), ("a.tmp.mp4", False), ("a.temp.mp4", False),
        ("~$a.csv", False), ("a.png~", False), ("a.mp4.crdownload", False), ("#a.json#", False),
    ],
)  # fmt: skip
def test_names(name: str, data: bool) -> None:
    assert is_visible(Path("x") / name) is data and is_visible(Path(".hidden") / name) is data


def test_links_are_searched_and_circles_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "real", root / ".hidden", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.mp4").touch()
    (root / "a_link").symlink_to(root / "real")  # is there anyway, under its own name
    (root / "other").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(root)
    (elsewhere / "deep" / "self").symlink_to(elsewhere / "deep")
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / "real" / "linked.mp4").symlink_to(elsewhere / "deep" / "a.mp4")
    names = [path.relative_to(root).as_posix() for path in walk(root)]
    assert names == ["broken", "other", "other/deep", "other/deep/a.mp4", "real", "real/a.mp4", "real/linked.mp4"]
    tally = Tally("clips")
    clips = list_clips(root, ClipsConfig(), tally)
    assert len(clips) == 2 and len({os.path.realpath(clip.path) for clip in clips}) == 2


def test_linked_folders_of_frames_and_of_cameras(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    (elsewhere / "film").mkdir(parents=True)
    root.mkdir()
    for name in ("0.png", "1.png", "._0.png", "1.png~", "2.tmp.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(elsewhere / "film" / "x.png")
        (elsewhere / "film" / "x.png").rename(elsewhere / "film" / name)
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 2, 3] = np.arange(3)
    for name in ("a.npy", "._b.npy", "c.tmp.npy"):
        np.save(elsewhere / "x.npy", poses)
        (elsewhere / "x.npy").rename(elsewhere / name)
    for part, value in (("pose", poses), ("intrinsics", np.ones((3, 4)))):
        (elsewhere / part).mkdir()
        np.savez(elsewhere / part / "v.npz", data=value)
    (elsewhere / "readme.txt").write_text("Paths of the camera.\n3 files\n")
    (elsewhere / "tum.txt").write_text("".join(f"{f} 0 0 {f} 0 0 0 1\n" for f in range(3)))
    (root / "linked").symlink_to(elsewhere)
    (clip,) = list_clips(root, ClipsConfig(layout="frames"), Tally("clips"))
    assert clip.clip_id == "linked/film"
    tally = Tally("camera paths")
    pool = load_pool(root, 3, TrajectoriesConfig(val_fraction=0), tally)
    assert [track.name for track in pool.tracks] == ["linked/a.npy", "linked/pose/v.npz", "linked/tum.txt"]
    assert tally.rejected == {}
    # A sidecar that a Mac leaves changes nothing that was prepared.
    before = content_hash(elsewhere / "film")
    (elsewhere / "film" / ".DS_Store").write_bytes(b"x")
    assert content_hash(elsewhere / "film") == before


def test_unfinished_parts_of_a_cache_are_no_windows(tmp_path: Path) -> None:
    settings = {"data": {"a": 1}, "encoder": {}}
    folder = CacheFolder(tmp_path, settings)
    (folder.path / "parts").mkdir(parents=True)
    (folder.path / "settings.json").write_text('{"data": {"a": 1}, "encoder": {}}')
    (folder.path / "parts" / ".k.x1.tmp.safetensors").write_bytes(b"half")
    (folder.path / "._shard-1.jsonl").write_bytes(b"\0\5")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "settings.json").write_text('{"data": {"a": 1}, "encoder": {"b": "c"}}')
    assert folder.entries() == {} and list(folder.verify()) == []
    assert open_cache(tmp_path, {"a": 1}).path == folder.path


def test_another_cleaning_of_text_prepares_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_hash({"data": data_settings(DataConfig()), "encoder": {}})
    assert settings_hash({"data": data_settings(DataConfig()), "encoder": {}}) == before
    monkeypatch.setattr("geoalign.data.prepare.CLEANING_VERSION", CLEANING_VERSION + 1)
    assert settings_hash({"data": data_settings(DataConfig()), "encoder": {}}) != before


def test_the_intrinsics_of_vipe_are_part_of_a_window(tmp_path: Path) -> None:
    for part in ("pose", "intrinsics"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "v.npz").write_bytes(part.encode())
    record = ClipRecord("v", "v", tmp_path / "v.mp4", camera=tmp_path / "pose" / "v.npz")
    keys = {window_key(record, "", 0, {})}
    keys.add(window_key(replace(record, camera=Path(f"{record.camera}#size=480x832")), "", 0, {}))
    (tmp_path / "intrinsics" / "v.npz").write_bytes(b"other")
    keys.add(window_key(record, "", 0, {}))
    assert len(keys) == 3
