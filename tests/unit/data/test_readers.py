"""Folders of frames as systems and people leave them, and what data sets say about odd clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from films import film, numbers, spelled
from PIL import Image

from geoalign.cli.main import main
from geoalign.config.data import ClipsConfig, DataConfig
from geoalign.data.cache import settings_hash
from geoalign.data.clips import list_clips
from geoalign.data.loader import ClipLoader
from geoalign.data.picture import ALPHA, INTERLACED
from geoalign.data.prepare import data_settings
from geoalign.data.readers import READER_VERSION, FrameFolderReader, open_reader
from geoalign.data.source import RetakeDataset
from geoalign.data.tally import Tally
from geoalign.errors import DataError
from geoalign.jobs.sample import read_inputs
from geoalign.jobs.score import probe
from geoalign.policy.open import open_policy


def folder(path: Path, names: list[str]) -> Path:
    """A folder whose image of each name spells its position in the list."""
    path.mkdir(parents=True)
    for name, picture in zip(names, spelled(len(names)), strict=True):
        Image.fromarray(picture).save(path / name)
    return path


def test_hidden_files_are_no_frames(tmp_path: Path) -> None:
    path = folder(tmp_path / "one", [f"{k:04d}.png" for k in range(8)])
    for k in range(8):
        (path / f"._{k:04d}.png").write_bytes(b"\0\5\26\7Mac OS X        ")
    (path / ".DS_Store").write_bytes(b"x")
    reader = open_reader("pyav")
    assert reader.probe(path).frames == 8 and reader.probe(path).remarks == ()
    assert numbers(reader.read(path, range(8))) == list(range(8))
    only = tmp_path / "two"
    only.mkdir()
    (only / "._0.png").write_bytes(b"x")
    assert [clip.clip_id for clip in list_clips(tmp_path, ClipsConfig(layout="frames"), Tally("clips"))] == ["one"]
    with pytest.raises(DataError, match="no images"):
        reader.probe(only)


@pytest.mark.parametrize(
    ("stems", "missing"),
    [
        (["0000", "0001", "0002", "0004"], 1),
        (["f9", "f10", "f13", "f14"], 2),
        (["0", "2", "4", "8"], 1),  # every second frame of a longer film, one of them missing
        (["0", "2", "4", "6"], 0),
        (["10.00.03", "10.00.59", "10.07.10", "11.30.00"], 0),  # times of day count nothing
        (["a", "b", "c"], 0),
    ],
)
def test_missing_numbers_are_counted(tmp_path: Path, stems: list[str], missing: int) -> None:
    path = folder(tmp_path / "one", [f"{stem}.png" for stem in stems])
    info = FrameFolderReader().probe(path)
    assert info.frames == len(stems)
    assert info.remarks == ((f"frame numbers missing, {missing} of them",) if missing else ())
    assert numbers(FrameFolderReader().read(path, range(len(stems)))) == list(range(len(stems)))


@pytest.mark.parametrize("other", ["thumb.png", "3_mask.png", "3.jpg"])
def test_other_images_beside_the_frames_are_refused(tmp_path: Path, other: str) -> None:
    path = folder(tmp_path / "one", [f"{k}.png" for k in range(8)])
    Image.fromarray(spelled(1)[0]).save(path / other)
    for use in (FrameFolderReader().probe, lambda found: FrameFolderReader().read(found, [0])):
        with pytest.raises(DataError, match="images of several kinds"):
            use(path)


def test_turned_photos_and_transparent_images(tmp_path: Path) -> None:
    path = tmp_path / "turned"
    path.mkdir()
    orientation = Image.Exif()
    orientation[0x0112] = 6  # stored turned left, shown turned right
    for index, picture in enumerate(spelled(4)):
        Image.fromarray(np.rot90(picture).copy()).save(path / f"{index}.jpg", quality=95, exif=orientation)
    assert FrameFolderReader().probe(path).height == 96
    assert numbers(FrameFolderReader().read(path, [3, 1])) == [3, 1]
    path = tmp_path / "clear"
    path.mkdir()
    Image.fromarray(spelled(1)[0]).convert("RGBA").save(path / "0.png")
    assert FrameFolderReader().probe(path).remarks == (ALPHA,)


def clips(tmp_path: Path, **files: dict) -> DataConfig:
    root = tmp_path / "clips"
    root.mkdir()
    for name, options in files.items():
        film(root / f"{name}.mp4", spelled(40), **options)
    return DataConfig(
        root=tmp_path,
        cache=tmp_path / "cache",
        num_frames=17,
        height=96,
        width=128,
        clips=ClipsConfig(stride=2, camera="none", caption="constant", val_fraction=0.0),
    )


def test_different_frame_rates_are_one_remark(tmp_path: Path) -> None:
    config = clips(tmp_path, v15={"fps": 15}, v30={"fps": 30}, v60={"fps": 60})
    loader = ClipLoader(config, open_reader("pyav"))
    records = list_clips(config.clips_path, config.clips, Tally("clips"))
    loader.starts(records[1])
    assert not loader.remarks()
    for record in records:
        loader.starts(record)
    (remark,) = loader.remarks()
    assert loader.remarks()[remark] == 3
    # 17 frames at stride 2 span 33 frames of the file.
    assert remark.startswith("frame rates differ, 15 to 60 a second") and remark.endswith("last 0.55 to 2.20 s")


def test_data_check_counts_what_sample_and_score_read(
    world: DataConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One number of frames, one rule for variable rates, one line per kind of remark."""
    paths = {name: world.root / "clips" / f"{name}.mp4" for name in ("woven", "vfr", "fast")}
    (world.root / "clips" / "metadata.csv").unlink()
    film(paths["woven"], spelled(40), options={"x264-params": "tff=1"}, fps=12)
    film(paths["vfr"], spelled(40), stamps=[k if k < 20 else 20 + 3 * (k - 20) for k in range(40)])
    film(paths["fast"], spelled(40), fps=60)
    settings = ["num_frames=5", "height=48", "width=64", "clips.stride=1", "clips.camera=none"]
    overrides = [f"data.root={world.root}", f"data.cache={world.cache}", *(f"data.{setting}" for setting in settings)]
    assert main(["data", "check", "--config", "smoke", *overrides]) == 0
    told = capsys.readouterr().out
    assert "14 clips usable, 1 rejected" in told and "1 x variable frame rate" in told
    assert f"{12 * 5 + 2 * 36} windows" in told  # 9 frames and 40 frames, windows of 5
    assert f"(1 x used although: {INTERLACED})" in told
    assert "(14 x used although: frame rates differ, 12 to 60 a second: windows of 5 frames at stride 1 last" in told
    assert "0.08 to 0.42 s)" in told
    codec = open_policy("builtin:tiny_base").codec
    for name in ("woven", "fast"):
        assert probe(paths[name], 40).frames == 40
        assert read_inputs(paths[name], "pan_right", codec=codec, frames=5)[0].source.video.shape[1] == 5
    told_once = [record.getMessage() for record in caplog.records if INTERLACED in record.getMessage()]
    assert told_once == [f"{paths['woven']}: {INTERLACED}"]
    for use in (lambda file: read_inputs(file, "pan_right", codec=codec, frames=5), lambda file: probe(file, 5)):
        with pytest.raises(DataError, match=r"vfr\.mp4: variable frame rate"):
            use(paths["vfr"])


def test_training_tells_every_kind_of_remark_once(world: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(12):
        film(world.root / "clips" / f"woven{index}.mp4", spelled(9), options={"x264-params": "tff=1"}, fps=24)
    (world.root / "clips" / "metadata.csv").unlink()
    config = world.model_copy(update={"clips": ClipsConfig(stride=1, camera="none", val_fraction=0.0)})
    data = RetakeDataset(config, seed=0)
    for iteration in range(4):
        data.batch(iteration, range(8))
    told = [record.getMessage() for record in caplog.records if record.name == "geoalign.data.source"]
    assert sorted(message.split(": ")[1].split(",")[0] for message in told) == ["frame rates differ", "interlaced"]


def test_a_newer_reader_makes_prepared_windows_stale(world: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_hash({"data": data_settings(world), "encoder": {}})
    assert settings_hash({"data": data_settings(world), "encoder": {}}) == before
    monkeypatch.setattr("geoalign.data.prepare.READER_VERSION", 1 + READER_VERSION)
    after = settings_hash({"data": data_settings(world), "encoder": {}})
    assert after != before
    assert after != settings_hash({"data": data_settings(world) | {"reader": world.clips.reader}, "encoder": {}})
