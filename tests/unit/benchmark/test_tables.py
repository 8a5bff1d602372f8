"""Tables of a fixed results file, character by character; what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from geoalign.benchmark.render import as_csv, latex, markdown, write_tables
from geoalign.benchmark.store import Store
from geoalign.benchmark.table import Results, all_tables, read_numbers
from geoalign.cli.main import main
from geoalign.config.load import load_config, to_yaml
from geoalign.config.schema import Config
from geoalign.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "benchmark"
CAMERA = ("rot_err_deg", "trans_err_published", "trans_err", "translation_error_m", "rotation_error_deg", "scale_ratio",
          "translation_gain")  # fmt: skip


def row(method: str, clip: str, path: str, speed: float, error: float | None) -> dict[str, Any]:
    """A case whose every number follows from ``error``; None: ViPE lost the camera."""
    still = path == "pan_right"
    metrics = {} if error is None else {name: error * (1 + place) for place, name in enumerate(CAMERA)}
    if still and metrics:
        metrics |= {"trans_err": None, "scale_ratio": None, "translation_gain": None, "trans_err_published": 0.0}
    found = {"status": "failed", "cause": "timed out after 1800 s", "metrics": {}, "by_frame": {}}
    if error is not None:
        found = {"status": "ok", "cause": "", "metrics": metrics, "by_frame": {}}
    quality = {"subject_consistency": 0.9, "dynamic_degree": 1.0 if error and error > 0.2 else 0.0}
    number = {"pan_right": 1, "zoom_in": 5}[path]
    return {
        "method": method, "case": f"{clip}_camera_{number}_speed_{speed:g}", "clip": clip, "path": path, "speed": speed,
        "status": "ok", "cause": "", "frames": 49, "video": f"videos/{method}/{clip}.mp4",
        "source": f"sources/{clip}_49.mp4", "metrics": {},
        "facts": {"rotation_deg_per_frame": 0.248 * speed if still else 0.0,
                  "translation_m_per_frame": 0.0 if still else 0.025 * speed,
                  "dynamic_share": {"bear": 0.3, "dog": 0.05, "swan": 0.1}[clip], "near_share": None},
        "readers": {"vipe": found, "vbench": {"status": "ok", "cause": "", "metrics": quality, "by_frame": {}},
                    "planar": {"status": "not applicable", "cause": "no ground plane is known of this clip",
                               "metrics": {}, "by_frame": {}}},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three clips x two paths x two speeds x two methods; the base loses one clip at speed 2."""
    store = Store(tmp_path)
    rows = []
    for place, clip in enumerate(("bear", "dog", "swan")):
        for path in ("pan_right", "zoom_in"):
            for speed in (1.0, 2.0):
                base = None if (clip, speed, path) == ("swan", 2.0, "zoom_in") else 0.2 * speed + 0.01 * place
                rows += [row("base", clip, path, speed, base), row("trained", clip, path, speed, 0.1 + 0.02 * place)]
    for item in rows:
        file = tmp_path / "rows" / item["method"] / f"{item['case']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(item))
    cases = [item["case"] for item in rows if item["method"] == "base"]
    readers = {
        "planar": {"cameras": True, "metrics": [], "licence": "", "kind": "planar", "is_the_reward": True},
        "vipe": {"cameras": True, "metrics": [], "licence": "Apache-2.0"},
        "vbench": {"cameras": False, "metrics": ["subject_consistency", "dynamic_degree"], "licence": "Apache-2.0"},
    }
    manifest = {"settings": {}, "methods": {"trained": {}, "base": {}}, "cases": cases, "readers": readers}
    (tmp_path / "benchmark.json").write_text(json.dumps(manifest))
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(Config, "smoke", ["benchmark.resamples=500"])))
    numbers = {"source": "arXiv 0000.00000, table 1", "methods": {"OtherMethod": {"rot_err_deg": 1.25}}}
    (tmp_path / "numbers.json").write_text(json.dumps(numbers))
    return store


def test_the_tables_of_a_fixed_results_file_are_the_committed_ones(store: Store, tmp_path: Path) -> None:
    tables = all_tables(Results.read(store))
    written = write_tables(tables, tmp_path / "tables")
    assert len(written) == 3 * len(tables) + 1
    for made in (
        tmp_path / "tables" / "tables.md",
        tmp_path / "tables" / "table1.tex",
        tmp_path / "tables" / "table1.csv",
    ):
        assert made.read_text() == (GOLDEN / made.name).read_text(), made.name


def test_what_is_said_of_what_is_missing(store: Store) -> None:
    tables = {table.name: table for table in all_tables(Results.read(store))}
    assert tables["table3"].notes[0].startswith("Not available: no method is called aesthetic or full.")
    assert tables["slice_near"].notes == ("Not available: no depth of the sources is known.",)
    assert "Not measured here: MEt3R, Dyn-MEt3R, background consistency" in " ".join(tables["table1"].notes)
    assert "left out: swan" in tables["table2"].notes[0]
    assert dict(tables["failures"].rows)["planar (is the reward): base"][:3] == ("0", "0", "12")
    (store.folder / "rows" / "trained" / "bear_camera_1_speed_1.json").unlink()
    unfinished = all_tables(Results.read(store))[0]
    assert unfinished.notes[-1] == "Unfinished: 1 of 24 cases are not measured yet."


def test_settings_of_the_tables_may_be_changed_afterwards(store: Store) -> None:
    changes = ["benchmark.base=trained", "benchmark.ablation=[trained,base]"]
    tables = {table.name: table for table in all_tables(Results.read(store, changes))}
    assert [label for label, _ in tables["table3"].rows] == ["trained", "base"]
    assert [label for label, _ in tables["table1_differences"].rows] == ["base"]


def test_special_characters_survive_every_format(store: Store) -> None:
    table = all_tables(Results.read(store))[0]
    text = latex(table)
    assert r"RotErr, deg $\downarrow$" in text and r"95 \% interval" in text and "OtherMethod" in text
    assert "$^\\dagger$" in text and text.count(r"\begin{tabular}") == 1
    assert markdown(table).count("\n| ") == 5
    assert as_csv(table).splitlines()[0].startswith("table,row,column,text,mean,low,high")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"methods": []}', "expected"),
        ('{"methods": {"A": {"rot_err_deg": "1.2"}}}', r"methods\.A\.rot_err_deg: should be a valid number"),
        ('{"methods": {"A": {"rot_err_deg": true}}}', "valid number"),
        ('{"methods": {"A": {"rot_err_deg": NaN}}}', "finite number"),
        ('{"methods": {"A": {"roterr": 1.2}}}', r"A: no table prints 'roterr'; did you mean rot_err_deg\?"),
        ('{"methods": {"A": {"rot_err_deg": 1}, "A": {"trans_err": 2}}}', "'A' is there twice"),
        ('{"methods": {}, "source": 3}', "source: should be a valid string"),
    ],
)
def test_numbers_of_others_are_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_numbers(tmp_path / "numbers.json")


def test_numbers_are_read_before_they_are_kept(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, bad = (store.folder / "numbers.json").read_text(), tmp_path / "bad.json"
    bad.write_text('{"methods": {"A": {"rot_err_deg": "1.2"}}}')
    assert main(["benchmark", "table", str(store.folder), "--numbers", str(bad)]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and (store.folder / "numbers.json").read_text() == kept


ROW, BENCHMARK = "rows/base/bear_camera_1_speed_1.json", "benchmark.json"


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    [
        (ROW, ("status",), "done", "status: should be 'ok' or 'failed'"),
        (ROW, ("speed",), "1", "speed: should be a valid number"),
        (ROW, ("speed",), float("nan"), "speed: should be a finite number"),
        (ROW, ("method",), "trained", "holds the case bear_camera_1_speed_1 of trained"),
        (ROW, ("case",), "dog_camera_1_speed_1", "holds the case dog_camera_1_speed_1 of base"),
        (ROW, ("readers",), [], "readers: should be a valid dictionary"),
        (ROW, ("readers", "vipe", "metrics", "rot_err_deg"), "0.2", "readers.vipe.metrics.rot_err_deg: "),
        (ROW, ("readers", "vipe", "by_frame"), {"frames": [0, 1]}, "unequal numbers of frames"),
        (ROW, ("frames",), 0, "frames: should be greater than or equal to 1"),
        (ROW, ("video",), None, "video: should be a valid string"),
        (ROW, ("facts",), ..., "facts missing"),
        (ROW, ("facts", "near_share"), "much", "facts.near_share: "),
        (BENCHMARK, ("methods",), ["base"], "methods: should be a valid dictionary"),
        (BENCHMARK, ("cases",), {}, "cases: should be a valid list"),
        (BENCHMARK, ("readers", "vipe", "cameras"), "yes", "readers.vipe.cameras: should be a valid boolean"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_one_line_with_its_place(
    store: Store, file: str, place: tuple[str, ...], value: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store.folder / file
    content = json.loads(path.read_text())
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    if value is ...:
        del holder[place[-1]]
    path.write_text(json.dumps(content))
    for verb in ("table", "report"):
        assert main(["benchmark", verb, str(store.folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"geoalign: error: {path}: ") and said in line


def test_hidden_and_temporary_files_are_no_rows(store: Store) -> None:
    before = store.rows()
    for name in ("._bear_camera_1_speed_1.json", "bear_camera_1_speed_1.json.part", "a.tmp.json"):
        (store.folder / "rows" / "base" / name).write_bytes(b"\0\5")
    assert store.rows() == before
