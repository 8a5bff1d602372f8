"""The bench of fidelity: equal settings agree to the bit, coarse ones do not, and a stopped table goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Brightness, Conditions, lively_policy, smoke, trainer_of

from geoalign.cli import fidelity as verb
from geoalign.cli.main import main
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.config.training import OdeConfig
from geoalign.errors import ConfigError, DataError, UsageError
from geoalign.files.locks import writer_lock
from geoalign.flow.table import StepWindow
from geoalign.jobs import fidelity
from geoalign.jobs.fidelity import Bench, Record, Setting, check_setting, table_rows
from geoalign.jobs.pricing import hours, tail_cost
from geoalign.perf.devices import DEVICES
from geoalign.training.drift import DRIFT, read_profile

GROUP = dict.fromkeys(("spearman", "kendall", "pearson", "flips", "flips_weighted", "psnr", "distance"), 0.5)
GROUP = {**GROUP, "shift": {"geometry": 0.1}, "spread": {"geometry": None}}
RECORD = {"setting": "a=1", "window": 1, "iteration": 0, "groups": [GROUP]}
WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {"window": WINDOW, "advantage": {"weights": {}}, "flow": {"steps": 8}}
    return smoke(**{name: base.get(name, {}) | changes.get(name, {}) for name in {*base, *changes}})


def test_the_same_tail_gives_the_same_bits_and_a_short_one_does_not() -> None:
    bench = Bench(config(), Conditions(config()), lively_policy(config()), {"b": Brightness()})
    round_ = fidelity._Round.begin(bench, StepWindow(1, 3), 0)
    assert torch.equal(round_.finish(Setting("", config())), round_.rollout.final)
    settings = [
        Setting("exact", config()),
        Setting("dpm2m", config(flow={"tail_solver": "dpm2m"})),
        Setting("reuse", config(ode={"reuse": "velocity", "reuse_share": 0.4})),
        Setting("one", config(flow={"tail_steps": 1})),
        Setting("bfloat16", config(run={"dtype": "bfloat16"})),
    ]
    records = list(bench.rounds(settings, [1], 3, lambda name, *_: name == "known"))
    assert [(r.setting, r.iteration, len(r.groups)) for r in records[:6]] == [
        ("exact", 0, 2), ("dpm2m", 0, 2), ("reuse", 0, 2), ("one", 0, 2), ("bfloat16", 0, 2), ("exact", 1, 2),
    ]  # fmt: skip
    assert all(group.spearman == 1.0 and group.psnr == pytest.approx(10 * 12 + 6.02, abs=0.01)  # 4 over 1e-12
               for record in records if record.setting == "exact" for group in record.groups)  # fmt: skip
    rows = {row["setting"]: row for row in table_rows(records, {s.name: s.config for s in settings}, config())}
    assert rows["exact"]["cost"] == 1.0 and rows["one"]["cost"] == pytest.approx(1 / 5)
    assert rows["reuse"]["cost"] == pytest.approx(2 / 5) and rows["reuse"]["hours"] < rows["exact"]["hours"]
    assert rows["one"]["psnr"] < rows["dpm2m"]["psnr"] < rows["exact"]["psnr"]
    assert rows["one"]["psnr"] < rows["bfloat16"]["psnr"] < rows["exact"]["psnr"]
    assert bench.policy.model.execution.dtype == torch.float32  # the copy has an execution of its own
    assert (rows["one"]["steps"], rows["one"]["sde"]) == (8, config().flow.sde)
    assert rows["reuse"]["groups"] == 4 and not rows["reuse"]["accepted"]  # too few groups
    assert Record.of(json.loads(json.dumps(records[1].as_json())), "f") == records[1]


def test_a_row_is_priced_behind_its_own_window() -> None:
    """T = 25: nine steps stand for 19 behind a window that ends at step 6, and for 11 where it ends at 14."""
    paper = load_config(Config, "paper_64xa800", ["flow.tail_grid=sigma", "flow.tail_steps=9"])
    records = [Record.of(RECORD | {"window": start}, "f") for start in (2, 10)]
    rows = table_rows(records, {"a=1": paper}, paper)
    assert [row["cost"] for row in rows] == pytest.approx([9 / 19, 9 / 11])
    assert rows[0]["hours"] == rows[1]["hours"] == hours(paper, DEVICES["a800"], 64)


def test_the_drift_alone_needs_no_scorer() -> None:
    source, policy = Conditions(config()), lively_policy(config())
    wanted = config(ode={"reuse": "residual"})
    found = Bench(wanted, source, policy, rewards={}).drift(Setting("", wanted))[DRIFT]
    for windows in ([1], [3, 1], [3]):  # a table measures it there too, whichever windows it is asked for
        asked, half = Setting("", wanted), Setting("half", config(ode={"reuse": "residual", "reuse_share": 0.4}))
        list(Bench(wanted, source, policy, {"b": Brightness()}).rounds([asked, half], windows, 1))
        assert found == asked.notes[DRIFT] == half.notes[DRIFT]
    trainer = trainer_of(wanted, rewards={"b": Brightness()})
    trainer.step()
    assert trainer.notes[DRIFT]["sigmas"] == found["sigmas"]
    # A trainer runs one group a forward here, the bench all of them: matrix products of other shapes.
    assert trainer.notes[DRIFT]["drift"] == pytest.approx(found["drift"], rel=1e-4)


def test_a_window_before_those_of_the_run_is_measured_there() -> None:
    wanted = config(ode={"reuse": "residual", "reuse_share": 0.4})
    asked = Setting("", wanted)
    bench = Bench(wanted, Conditions(wanted), lively_policy(wanted), {"b": Brightness()})
    list(bench.rounds([asked], [1], 1))
    before = asked.notes[DRIFT]
    list(bench.rounds([asked], [0], 1))
    assert len(asked.notes[DRIFT]["sigmas"]) == len(before["sigmas"]) + 1


def test_settings_that_touch_the_window_are_refused() -> None:
    check_setting("ok", config(ode={"reuse": "residual"}), config())
    with pytest.raises(UsageError, match=r"changes flow\.eta"):
        check_setting("flow.eta=0.5", config(flow={"eta": 0.5}), config())


@pytest.mark.parametrize(
    ("records", "said"),
    [(None, "holds no records"), ([{}], "record 1: setting: Field required"), ([RECORD, RECORD], "there twice"),
     ([RECORD | {"groups": []}], "record 1: groups: "), ([RECORD | {"window": "1"}], "record 1: window: "),
     ([RECORD | {"groups": [GROUP | {"spread": {}}]}], "not of the same scores"),
     ([RECORD | {"groups": [GROUP | {"flips": "0.1"}]}], "record 1: groups.0.flips: "),
     ({"a=1": 3}, "notes of a=1: no object"), ({"a=1": {"ode_modes": 1}}, "notes of a=1: ode_modes: "),
     ({"a=1": {"tail_drift": {"sigmas": [1.0], "drift": []}}}, "notes of a=1: ")],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(records: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"made_with": {}, "records": [RECORD]}))
    assert [record.groups[0].spearman for record in verb._earlier(file, {})[0]] == [0.5]
    kept = {"records": [RECORD], "notes": records} if isinstance(records, dict) else {"records": records}
    file.write_text(json.dumps({"made_with": {}, **kept}))
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: .*{re.escape(said)}"):
        verb._earlier(file, {})


def test_the_command_continues_its_file_and_chooses_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    judge = fidelity._judge
    monkeypatch.setattr(fidelity, "_judge", lambda *a, **k: made.append("") or judge(*a, **k))
    monkeypatch.setattr(verb, "_source", lambda loaded: Conditions(loaded))
    file, own = tmp_path / "f.json", ["--config", "smoke", "flow.steps=6", "train.base=builtin:tiny_base"]
    command = ["fidelity", "run", *own, "--groups", "2", "--json", str(file)]
    reuse = "ode.reuse=residual ode.reuse_share=0.5"
    assert main([*command, "--setting", reuse, "--setting", "flow.tail_steps=2"]) == 0 and len(made) == 3
    noted = json.loads(file.read_text())["notes"]
    made.clear()
    assert main([*command, "--setting", reuse, "--window", "1"]) == 0 and len(made) == 2
    assert json.loads(file.read_text())["notes"] == noted  # its steps are chosen once
    made.clear()
    assert main([*command, "--setting", "flow.tail_steps=2"]) == 0 and not made
    assert json.loads(file.read_text())["notes"] == noted
    made += ["", ""]
    both = ["--setting", "flow.tail_steps=2", "--setting", "flow.tail_grid=sigma", "--setting", "flow.tail_grid=sigma"]
    assert main([*command, *both]) == 0 and len(made) == 4  # the exact rollout again, and the new setting
    rows = json.loads(file.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["flow.tail_steps=2", "flow.tail_grid=sigma"]
    assert [row["groups"] for row in rows] == [2.0, 2.0]  # a setting named twice counts once
    assert main([*command, *both, "run.seed=5"]) == 2
    with writer_lock(tmp_path, "table", ".lock-f.json"):
        assert main([*command, *both]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "another process writes this table" in said and not list(tmp_path.glob(".lock*"))
    out = tmp_path / "drift.json"
    assert main(["fidelity", "choose", *own, "--out", str(out)]) == 2
    assert main(["fidelity", "choose", *own, "ode.reuse=residual", "--out", str(out)]) == 0
    base = Path("builtin:tiny_base")
    assert len(read_profile(out, "residual", base).sigmas) == 5
    told = rf"ode.reuse=residual, and the run says velocity; make it with `geoalign fidelity choose .* --out {out}`"
    with pytest.raises(ConfigError, match=told):
        read_profile(out, "velocity", base)
    profile = "ode.reuse=velocity ode.reuse_profile=" + str(out)
    assert main([*command, "--price", "paper_64xa800"]) == 2
    assert "samples in 25 steps" in capsys.readouterr().err
    assert main([*command, "--setting", profile]) == 2 and main([*command, "--setting", profile + "x"]) == 2


def test_a_profile_of_the_configuration_is_that_of_its_own_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default settings measure their own, whatever kind the configuration's is of; a file is its content."""
    monkeypatch.setattr(verb, "_source", lambda loaded: Conditions(loaded))
    other = "ode.reuse=velocity ode.reuse_share=0.5"
    monkeypatch.setattr(verb, "DEFAULT_SETTINGS", (other,))
    smallest = ["--config", "smoke", "flow.steps=6", "train.base=builtin:tiny_base", "ode.reuse=residual"]
    out, file = tmp_path / "drift.json", tmp_path / "f.json"
    assert main(["fidelity", "choose", *smallest, "--out", str(out)]) == 0
    table = ["fidelity", "run", *smallest, f"ode.reuse_profile={out}", "--groups", "2", "--json", str(file)]
    assert main(table) == 0
    own = f"ode.reuse=residual ode.reuse_share=0.5 ode.reuse_profile={out}"
    notes = json.loads(file.read_text())["notes"]
    assert [notes[name]["tail_drift_under"]["from"].split()[0] for name in (own, other)] == ["the", "measured"]
    assert notes[own][DRIFT] != notes[other][DRIFT]
    assert main(table) == 0
    out.write_text(json.dumps(json.loads(out.read_text()) | {"drift": [0.0, 0.1, 0.2, 0.3, 0.4]}))
    capsys.readouterr()
    assert main(table) == 2
    assert "was measured with another drift of ode.reuse" in capsys.readouterr().err


def test_prices_are_those_of_the_tail_and_of_the_whole_run() -> None:
    """The paper's run: 19 steps are left after a window that ends at step 6, 9 of them cost 9 / 19."""
    fixed = ["window.kind=fixed", "window.start=2", "window.max_start=2"]
    paper = load_config(Config, "paper_64xa800", fixed)
    card = DEVICES["a800"]
    reuse = paper.model_copy(update={"ode": OdeConfig(reuse="residual", reuse_share=9 / 19)})
    int8 = paper.model_copy(update={"ode": OdeConfig(attention="int8")})
    assert tail_cost(paper, card) == 1.0 and tail_cost(reuse, card) == pytest.approx(9 / 19)
    assert 0.6 < tail_cost(int8, card) < 0.9
    assert max(hours(reuse, card, 64), hours(int8, card, 64)) < hours(paper, card, 64)
