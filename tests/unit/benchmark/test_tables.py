"""Tables of a fixed results file, character by character; what is missing is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fixed_results import fixed_results

from geoalign.benchmark.render import as_csv, latex, markdown, write_tables
from geoalign.benchmark.report import worst_cases
from geoalign.benchmark.report_tables import LinkedTables
from geoalign.benchmark.store import Store
from geoalign.benchmark.table import Results, all_tables, read_numbers
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
        ('{"methods": {"A": {"rot_err_deg": "1.2"}}}', r"A: rot_err_deg is '1.2', not a number"),
        ('{"methods": {"A": {"rot_err_deg": true}}}', "not a number"),
    ],
)
def test_numbers_of_others_are_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_numbers(tmp_path / "numbers.json")
