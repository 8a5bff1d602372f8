"""Tables as people and programs write them: what fits is read word for word, what does not is told with its line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from geoalign.config.data import ClipsConfig
from geoalign.data.clips import list_clips
from geoalign.data.omniworld import read_metadata
from geoalign.data.tables import read_table
from geoalign.data.tally import Tally
from geoalign.errors import DataError

LENGTH, OPEN, PLACE = "another length", "not closed", "out of place"


def listed(root: Path, text: str, name: str = "metadata.csv") -> tuple[dict[str, str], dict[str, str]]:
    """Captions by clip, and the causes of what was rejected."""
    for clip in range(4):
        (root / f"c{clip}.mp4").touch()
    (root / name).write_bytes(text.encode())
    tally = Tally("clips")
    records = list_clips(root, ClipsConfig(), tally)
    return {record.clip_id: record.caption for record in records}, tally.rejected


@pytest.mark.parametrize(
    ("text", "captions", "misfits"),
    [
        ("c0.mp4,a street, wet, at night\nc1.mp4,x", {"c1": "x"}, {2: LENGTH}),
        ('c0.mp4,"a street, wet"\r\nc1.mp4,x\r\n', {"c0": "a street, wet", "c1": "x"}, {}),
        ('c0.mp4,"never closed\nc1.mp4,x\nc2.mp4,y', {"c1": "x", "c2": "y"}, {2: OPEN}),
        ('c0.mp4,"first\nc1.mp4,x\nc2.mp4,closed by another"\nc3.mp4,z', {"c1": "x", "c3": "z"}, {2: OPEN, 4: OPEN}),
        ('c0.mp4,"first\nc1.mp4,x\nc2.mp4,"y"\nc3.mp4,z', {"c1": "x", "c2": "y", "c3": "z"}, {2: OPEN}),
        ('c0.mp4,a 5" pipe\nc1.mp4,x', {"c1": "x"}, {2: None}),
        ('c0.mp4,"a "good" street"\nc1.mp4,x', {"c1": "x"}, {2: PLACE}),
        ('c0.mp4,"a ""good"" street"\nc1.mp4,x', {"c0": 'a "good" street', "c1": "x"}, {}),
        ('c0.mp4,"two\nlines, both, mine"\nc1.mp4,x', {"c0": "two\nlines, both, mine", "c1": "x"}, {}),
        ("c0.mp4,one\u2028two\u0085three\x0bfour\x1cfive\x0csix\nc1.mp4,x",
         {"c0": "one\u2028two\u0085three\x0bfour\x1cfive\x0csix", "c1": "x"}, {}),
        ("c0.mp4,mac\rc1.mp4,x\nc2.mp4,y", {"c2": "y"}, {2: None}),
        ("c0.mp4\nc1.mp4,x\n\n  \nc2.mp4,", {"c1": "x", "c2": ""}, {2: LENGTH}),
        ("c0.mp4,x\n._c1.mp4,y\nc2.mp4.part,z", {"c0": "x"}, {}),
        (".\\c0.mp4,x\nC:\\videos\\c1.mp4,y", {"c0": "x", "c1": "y"}, {}),
    ],
)  # fmt: skip
def test_csv_rows(tmp_path: Path, text: str, captions: dict[str, str], misfits: dict[int, str | None]) -> None:
    found, rejected = listed(tmp_path, f"path,caption\n{text}")
    assert found == captions
    hidden = {"._c1.mp4", "c2.mp4.part"} & rejected.keys()
    assert sorted(rejected.keys() - hidden) == [f"line {line}" for line in sorted(misfits)]
    assert {rejected[name] for name in hidden} <= {"hidden or temporary file"} and len(hidden) == 2 * ("._c1" in text)
    for line, words in misfits.items():
        assert (words or "") in rejected[f"line {line}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path;caption\nc0.mp4;x\n", "holds no comma; save it with commas"),
        ("path,caption,caption\nc0.mp4,x,y\n", "the column caption appears twice"),
        ("Path,Caption\nc0.mp4,x\n", r"expected one of .*got \['Path', 'Caption'\]"),
        ("c0.mp4,x\nc1.mp4,y\n", r"got \['c0.mp4', 'x'\]"),
        ('path,"caption\nc0.mp4,x\n', "line 1: a quote that is not closed"),
        ("path,caption\nc0.mp4,x,y\n", "no usable clips"),
    ],
)  # fmt: skip
def test_headers_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        listed(tmp_path, text)


def test_other_encodings_say_so(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes("path,caption\nc0.mp4,x\n".encode("utf-16"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        list_clips(tmp_path, ClipsConfig(), Tally("clips"))


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        json.dumps({"path": "c0.mp4", "caption": "one\u2028two\u2029three\x85four", "tags": ["a"]}, ensure_ascii=False),
        "{broken", '["c1.mp4"]', '{"path": "c1.mp4", "path": "c2.mp4"}', '{"path": "c1.mp4", "caption": ["x", "y"]}',
        "", "[" * 100_000, '{"path": "c3.mp4", "caption": null, "start_frame": 3, "end_frame": 9}',
    ]  # fmt: skip
    found, rejected = listed(tmp_path, "\r\n".join(rows), "metadata.jsonl")
    assert found == {"c0": "one\u2028two\u2029three\x85four", "c3": ""}
    assert sorted(rejected) == [f"line {line}" for line in (2, 3, 4, 5, 7)]
    assert rejected["line 5"] == "caption is a list or an object" and rejected["line 3"] == "not a JSON object"


@pytest.mark.parametrize("bounds", ["3.5,9", "3,9.5", "nan,9", "3,inf", "9,3", "-1,3", "1e400,", "soon,"])
def test_bounds_are_whole_frames(tmp_path: Path, bounds: str) -> None:
    found, rejected = listed(tmp_path, f"path,start_frame,end_frame\nc0.mp4,{bounds}\nc1.mp4,3.0,9\n")
    assert found == {"c1": ""} and rejected == {"c0": "bad start_frame or end_frame"}


def test_whatever_csv_writes_is_read_back(tmp_path: Path) -> None:
    """Random texts of the characters that matter, written by Python's own writer; and no damage takes two rows."""
    generator = torch.Generator().manual_seed(0)
    letters = 'ab ,"\n\r;\u2028\u0085\ufeff\u00e9'
    for trial in range(150):
        texts = [
            "x" + "".join(letters[i] for i in torch.randint(len(letters), (12,), generator=generator)) + "y"
            for _ in range(6)
        ]
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\n" if trial % 2 else "\r\n", quoting=csv.QUOTE_ALL).writerows(
            [["path", "caption"], *[[f"c{k}.mp4", text] for k, text in enumerate(texts)]]
        )
        (tmp_path / "t.csv").write_bytes(stream.getvalue().encode())
        table = read_table(tmp_path / "t.csv")
        # A carriage return before a newline inside a text is a line end like any other.
        wanted = [text.replace("\r\n", "\n").strip() for text in texts]
        assert [row.values["caption"] for row in table.rows] == wanted and not table.misfits
    lines = [f'"c{k}.mp4","text {k}, long"' for k in range(40)]
    for trial in range(150):
        damaged = list(lines)
        place = int(torch.randint(40, (), generator=generator))
        cut = int(torch.randint(1, len(lines[place]), (), generator=generator))
        damaged[place] = lines[place][:cut] + (lines[place][cut + 1 :] if trial % 2 else "")
        (tmp_path / "t.csv").write_text("\n".join(["path,caption", *damaged]))
        table = read_table(tmp_path / "t.csv")
        lost = {f"c{k}.mp4" for k in range(40)} - {row.values.get("path") for row in table.rows}
        assert lost <= {f"c{place}.mp4"} and len(table.rows) + len(table.misfits) == 40


def test_tables_of_scenes_count_their_misfits(tmp_path: Path) -> None:
    (tmp_path / "scenes.csv").write_text('UID,Test Split Index,Metric Scale\na,"1,2",2.0\nb,1,2,3.0\n,1,2\nc,,1.5\n')
    tally = Tally("camera paths")
    facts = read_metadata(tmp_path / "scenes.csv", tally)
    assert sorted(facts) == ["a", "c"] and facts["a"].test_splits == {1, 2} and facts["c"].metric_scale == 1.5
    assert sorted(tally.rejected) == ["scenes.csv line 3", "scenes.csv line 4"]
