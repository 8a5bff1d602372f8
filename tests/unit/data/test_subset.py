"""What to fetch for some hours: whole videos, nested in each other, from the tables as published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geoalign.cli.main import main
from geoalign.config.data import ClipsConfig
from geoalign.data.clips import list_clips
from geoalign.data.subset import choose
from geoalign.data.tables import read_table
from geoalign.data.tally import Tally
from geoalign.errors import DataError, UsageError


@pytest.fixture
def sekai(tmp_path: Path) -> Path:
    """40 videos of 1 to 4 clips of a minute; ids begin with - and hold _, one row is there twice, one is empty."""
    rows = [f"-v_{n:02}x_{k * 1800:07}_{(k + 1) * 1800:07}.mp4" for n in range(40) for k in range(n % 4 + 1)]
    lines = [f'{name},{name[:-4]}.npz,"a street, rain",Tokyo' for name in (*rows, rows[0])]
    path = tmp_path / "sekai.csv"
    path.write_text("\ufeffvideoFile,cameraFile,caption,location\n" + "\n".join([*lines, ",,,"]) + "\n", "utf-8")
    return path


def test_whole_videos_until_the_hours_are_reached(sekai: Path) -> None:
    small, large, other = choose([sekai], 0.3), choose([sekai], 1.0), choose([sekai], 0.3, seed=1)
    assert all(item.seconds == 60.0 for item in large.items)
    assert 0.3 <= small.hours < 0.3 + 4 / 60 and 1.0 <= large.hours < 1.0 + 4 / 60
    assert large.sources[: len(small.sources)] == small.sources != other.sources[: len(small.sources)]
    for source in large.sources:  # each with all of its clips
        number = int(re.search(r"v_(\d+)x", source)[1])
        assert sum(item.source == source for item in large.items) == number % 4 + 1
    everything = choose([sekai], 99)
    assert len(everything.items) == 100 and len(everything.sources) == 40 and everything.left_out == 2


def test_the_verb_writes_lists_that_training_reads(sekai: Path, capsys: pytest.CaptureFixture[str]) -> None:
    citywalk = sekai.with_name("citywalk.csv")
    chosen = sorted({item.name for item in choose([sekai], 99).items})[::2]
    citywalk.write_text("UID,Frames\n" + "".join(f"{name},1800\n" for name in chosen))
    folder = sekai.parent / "clips"
    tables = ["--table", str(sekai), "--table", str(citywalk)]
    assert main(["data", "subset", *tables, "--hours", "0.5", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    videos = (folder / "fetch.txt").read_text().splitlines()
    assert f"clips of {len(videos)} videos" in said and len(set(videos)) == len(videos)
    found = choose([sekai, citywalk], 0.5)
    assert videos == [f"https://www.youtube.com/watch?v={source}" for source in found.sources]
    assert {item.name for item in found.items} <= set(chosen)
    for item in found.items:  # as the published tools cut them
        file = folder / "files" / item.source / f"{item.name}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    records = list_clips(folder, ClipsConfig(), Tally("clips"))
    assert {record.clip_id for record in records} == {item.name for item in found.items}
    assert {record.caption for record in records} == {"a street, rain"}


def test_scenes_are_listed_as_archives(tmp_path: Path) -> None:
    table = tmp_path / "scenes.csv"
    rows = [f"{n:012x},{2400 * (n % 3 + 1)},24.0" for n in range(9)]
    table.write_text("UID,Total Img Num,FPS\n" + "\n".join(rows) + "\n")
    found = choose([table], 0.2)
    assert found.kind == "scenes" and 0.2 <= found.hours < 0.2 + 300 / 3600
    found.write(tmp_path / "out")
    lines = (tmp_path / "out" / "fetch.txt").read_text().splitlines()
    assert lines == [f"annotations/OmniWorld-Game/{uid}/{uid}_others.tar.gz" for uid in found.sources]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fetch.txt"]


def test_a_table_of_neither_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text("name,size\na,1\n")
    with pytest.raises(DataError, match=r"other\.csv: names neither clips"):
        choose([table], 1)


@pytest.mark.parametrize(
    ("images", "fps", "seconds"),
    [("nan", "24", 0.0), ("inf", "24", 0.0), ("-5", "24", 0.0), ("", "24", 0.0), ("2400", "nan", 100.0),
     ("2400", "-24", 100.0), ("2400", "0", 100.0), ("2400", "12", 200.0), ("2400", "x", 100.0)],
)  # fmt: skip
def test_numbers_that_are_none_count_nothing(images: str, fps: str, seconds: float, tmp_path: Path) -> None:
    table = tmp_path / "scenes.csv"
    table.write_text(f"UID,Img Num,FPS\n{0:012x},{images},{fps}\n")
    assert [item.seconds for item in choose([table], 1).items] == [seconds]


def test_rows_that_do_not_fit_and_numbers_of_any_length_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"videoFile,caption\nv_0_1800.mp4,a\nw_0_1800.mp4,a, b\ny_0_1800.mp4,d\nx_0_{'9' * 5000}.mp4,c\n")
    assert main(["data", "subset", "--table", str(table), "--hours", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 clips of 2 videos" in said and "1 rows name neither" in said
    assert "1 rows do not fit the table and were left out; the first, line 3: " in said


def test_a_table_that_no_subset_wrote_is_not_replaced(sekai: Path) -> None:
    folder = sekai.parent / "clips"
    folder.mkdir()
    own = folder / "metadata.csv"
    own.write_bytes(sekai.read_bytes())
    with pytest.raises(UsageError, match=r"metadata\.csv: no earlier subset wrote this table"):
        choose([own], 0.3).write(folder)
    assert own.read_bytes() == sekai.read_bytes()
    own.unlink()
    for hours in (0.3, 1.0):  # a larger one of our own replaces the smaller
        choose([sekai], hours).write(folder)
    assert len(read_table(own).rows) == len(choose([sekai], 1.0).items)
