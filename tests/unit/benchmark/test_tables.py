"""Tables of a fixed results file, character by character; what is missing is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fixed_results import fixed_results

from geoalign.benchmark.render import as_csv, latex, markdown, write_tables
from geoalign.benchmark.report import _note, report_page, worst_cases
from geoalign.benchmark.report_tables import LinkedTables
from geoalign.benchmark.store import Store
from geoalign.benchmark.table import Results, all_tables, read_numbers
from geoalign.cli.main import main
from geoalign.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "benchmark"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return fixed_results(tmp_path)


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
    counts = dict(tables["failures"].rows)["planar (is the reward): base"][:3]
    assert [cell.shown for cell in counts] == ["0", "0", "12"]
    (store.folder / "rows" / "trained" / "bear_camera_1_speed_1.json").unlink()
    unfinished = all_tables(Results.read(store))[0]
    assert unfinished.notes[-1] == "Unfinished: 1 of 24 cases are not measured yet."


def test_every_number_leads_to_its_cases_the_worst_first(store: Store) -> None:
    """Every cell that shows a number is a link; what it leads to is compared with the rows by hand."""
    results = Results.read(store)
    cases = worst_cases(results)
    linked, tables = LinkedTables(results, cases), all_tables(results)
    html = {table.name: linked.html(table) for table in tables}
    facts = json.loads(linked.behind().split('id="behind-facts">')[1].split("</script>")[0].replace("\\u003c", "<"))
    links = re.findall(r'<a href="#case-([^"]+)" data-behind="(\d+)">', "".join(html.values()))
    assert [int(number) for _, number in links] == list(range(len(facts["cells"])))
    for case, number in links:
        behind = facts["cells"][int(number)]
        assert facts["cases"][behind["cases"][0][0]] == case and len(behind["cases"]) == behind["of"]
        assert behind["method"] in results.methods
    for text in html.values():  # no number without its cases, but for counts of nothing and numbers of others
        for row in re.findall(r"<tr><td>.*?</td>(.*?)</tr>", text):
            for cell in re.findall(r"<td>(.*?)</td>", row):
                assert cell.startswith("<a ") or re.match(r"\D*$|0( of \d+)?$|1\.25\N{DAGGER}$", cell), cell

    def behind_cell(title: str) -> list[tuple[str, str]]:
        found = next(cell for cell in facts["cells"] if cell["title"] == title)
        return [(facts["cases"][place], shown) for place, shown in found["cases"]]

    position = "position, m \N{DOWNWARDS ARROW}"
    base = behind_cell(f"Table 1: consistency, camera accuracy and quality: base, {position}")
    assert base[0] == ("swan_camera_5_speed_2", "timed out after 1800 s") and len(base) == 12
    assert base[1][0].startswith("swan_camera_1_speed_2") and base[-1][0] == "bear_camera_5_speed_1"
    trained = behind_cell(f"Table 1: consistency, camera accuracy and quality: trained, {position}")
    assert [case.split("_")[0] for case, _ in trained] == ["swan"] * 4 + ["dog"] * 4 + ["bear"] * 4
    pairs = behind_cell(f"Table 1: differences from the base: trained, {position}")
    assert pairs[0] == ("swan_camera_5_speed_2", "no pair") and len(pairs) == 12
    differences = [float(shown.replace("\N{MINUS SIGN}", "-")) for _, shown in pairs[1:]]
    assert differences == sorted(differences, reverse=True) and differences[-1] == pytest.approx(4 * (0.1 - 0.4))
    ratio = behind_cell("Table 1: consistency, camera accuracy and quality: trained, scale ratio \N{RIGHTWARDS ARROW}1")
    assert ratio[0][0].startswith("bear_camera_5")  # 0.6 is further from 1 than 0.84
    degree = behind_cell("Table 1: consistency, camera accuracy and quality: base, dynamic degree \N{UPWARDS ARROW}")
    assert degree[0][1] == "0" and degree[-1][1] == "1.00"
    lost = behind_cell("Table 1: consistency, camera accuracy and quality: base, failed cases")
    assert lost == base[:1]


def test_without_a_reader_of_cameras_a_case_is_told_by_itself(store: Store) -> None:
    """Only VBench measured: cases that are there are measured, and nothing speaks of positions."""
    manifest = json.loads((store.folder / "benchmark.json").read_text())
    manifest["readers"] = {"vbench": manifest["readers"]["vbench"]}
    (store.folder / "benchmark.json").write_text(json.dumps(manifest))
    for file in (store.folder / "rows").rglob("*.json"):
        content = json.loads(file.read_text())
        content["readers"] = {"vbench": content["readers"]["vbench"]}
        if content["method"] == "trained" and content["case"] == "swan_camera_5_speed_2":
            content |= {"status": "failed", "cause": "no space left"}
        file.write_text(json.dumps(content))
    results = Results.read(store)
    cases = worst_cases(results)
    assert cases == ["swan_camera_5_speed_2", *sorted({row["case"] for row in results.rows} - {cases[0]})]
    page = re.sub(r"<script.*?</script>", "", report_page(store, results), flags=re.DOTALL)
    assert "not measured yet" not in page and "position error" not in page.lower() and "said where" not in page
    assert "no space left" in page
    rows = re.findall(r'<tr id="case-([^"]+)">(.*?)</tr>', page)
    assert [name for name, _ in rows] == cases
    assert all(cells.count(">video</a>") == (1 if name == cases[0] else 2) for name, cells in rows)
    tables = {table.name: table for table in all_tables(results)}
    assert [dict(tables["table1"].rows)[m][-1].shown for m in results.methods] == ["0 of 12", "1 of 12"]
    assert _note(results, {row["method"]: row for row in results.rows if row["case"] == cases[0]}) == (
        "base \N{MIDDLE DOT} trained: no space left"
    )


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
    begins, error = capsys.readouterr().err.splitlines()
    assert begins.endswith("benchmark: loading") and "bad.json" in error
    assert (store.folder / "numbers.json").read_text() == kept


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
        _, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"geoalign: error: {path}: ") and said in line


def test_hidden_and_temporary_files_are_no_rows(store: Store) -> None:
    before = store.rows()
    for name in ("._bear_camera_1_speed_1.json", "bear_camera_1_speed_1.json.part", "a.tmp.json"):
        (store.folder / "rows" / "base" / name).write_bytes(b"\0\5")
    assert store.rows() == before
