"""`geoalign budget`: output, JSON, misuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from geoalign.cli.main import main
from geoalign.config.load import flatten, load_config
from geoalign.config.schema import Config
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.jobs import ladder
from geoalign.jobs.pricing import audit_cost, exactly, hours, left_out, plan_with_levers, run_cost
from geoalign.perf.budget import Walk, count_passes
from geoalign.perf.devices import DEVICES
from geoalign.training.processes.ranks import LocalRanks, RankRows
from geoalign.training.tail import Auditor


def test_prints_the_ladder_and_every_rung_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "EXACT levers together" in text and "one CHANGES rung at a time" in text
    numbers = json.loads(file.read_text())
    assert numbers["predicted"] is True
    assert numbers["devices"] == 64
    assert numbers["forwards_per_iteration"] == 64 * 396
    assert numbers["hours"]["exact"] < numbers["hours"]["reference"]
    for rung in numbers["ladder"]:
        assert rung["lever"] in text
    rungs = {rung["settings"]: rung for rung in numbers["changes"]}
    assert all(rung["hours"] < numbers["hours"]["exact"] and rung["rung"] in text for rung in rungs.values())
    # A pair that was measured together is a rung; nothing is the sum of two others.
    pair, one = rungs["ode.reuse=residual ode.reuse_share=0.45 ode.attention=int8"], rungs["ode.attention=int8"]
    assert pair["hours"] < one["hours"]
    assert rungs["learn.window_steps=2"]["fidelity"] is None and not rungs["learn.window_steps=2"]["changes_videos"]
    assert "as_configured" not in numbers and "changes" not in numbers["hours"]
    assert sum(numbers["share"].values()) == pytest.approx(1.0)


def test_overrides_and_guidance_change_the_prediction(tmp_path: Path) -> None:
    def hours(*arguments: str) -> dict[str, float]:
        file = tmp_path / "budget.json"
        assert main(["budget", "--config", "paper_64xa800", *arguments, "--json", str(file)]) == 0
        return json.loads(file.read_text())["hours"]

    plain, four = hours(), hours("optim.updates_per_rollout=4", "levers.streaming=off")
    assert four["reference"] == plain["reference"] and four["exact"] > plain["exact"]
    assert hours("flow.guidance=5")["reference"] > 1.9 * plain["reference"]
    assert hours("--device", "h200")["reference"] < plain["reference"]
    assert hours("window.size=2")["reference"] < plain["reference"]


def test_walks_come_from_the_schedule_of_the_run() -> None:
    paper = load_config(Config, "paper_64xa800", [])
    assert run_cost(paper).walks == {Walk(start, 4, 21 - start): 25 if start < 5 else 15 for start in range(6)}
    coarse = load_config(Config, "paper_64xa800", ["flow.tail_ratio=0.4"])
    assert [walk.tail for walk in run_cost(coarse).walks] == [7, 7, 7, 6, 6, 5]
    reuse = load_config(Config, "paper_64xa800", ["ode.reuse=velocity", "ode.reuse_share=0.45"])
    # All steps of the first iteration, which measures the drift; then 0.45 of 21 to 16, rounded up.
    assert [(walk.tail, times) for walk, times in run_cost(reuse).walks.items()] == [
        (21, 1), (10, 24), (9, 25), (9, 25), (9, 25), (8, 25), (8, 15),
    ]  # fmt: skip
    known = load_config(Config, "paper_64xa800", ["ode.reuse=velocity", "ode.reuse_share=0.45", "ode.reuse_profile=d"])
    assert [walk.tail for walk in run_cost(known).walks] == [10, 9, 9, 9, 8, 8]
    assert left_out(paper) == []


def test_rungs_of_learning_cost_what_their_shares_say() -> None:
    """Each against the exact run: what falls away is half of the learner, three quarters of HPSv3, and so on."""
    card = DEVICES["a800"]

    def spent(*overrides: str) -> float:
        return hours(load_config(Config, "paper_64xa800", overrides), card, 64)

    paper = load_config(Config, "paper_64xa800")
    parts = run_cost(paper).seconds(card, plan_with_levers(paper))
    whole = spent()
    assert whole == pytest.approx(parts.total / 64 / 3600)
    assert spent("learn.window_steps=2") == pytest.approx(whole - 1.02 * parts.learner / 2 / 64 / 3600)
    short = spent("data.num_frames=49")
    assert spent("learn.short_frames=49", "learn.short_iterations=140") == pytest.approx(short)
    assert short < spent("learn.short_frames=49", "learn.short_iterations=70") < whole
    video = run_cost(paper).video
    saved = video.scorers["hpsv3"] * (1 - 21 / 81) / card.reward * 140 * 12 * 1.02 / 3600
    assert spent("rewards.hpsv3.options.frame_stride=4") == pytest.approx(whole - saved)
    # Six of twelve members: fewer backwards, but they are replayed.
    chosen = load_config(Config, "paper_64xa800", ["learn.members=6", "levers.streaming=off"])
    count = count_passes(Walk(2, 4, 19), 1, 12, 1, plan_with_levers(chosen))
    assert (count.backward, count.replay) == (1 + 6 * 3, 1 + 6 * 3)


def test_the_fast_preset_says_what_it_rests_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800_fast", "--json", str(file)]) == 0
    own = json.loads(file.read_text())["as_configured"]
    assert own["hours"] < own["hours_at_low_end"] <= 45.0 and own["audits"] == 3
    assert 0 < own["audit_hours"] < 0.1 * own["hours"]
    text = capsys.readouterr().out
    assert "assumed to hold on other weights" in text
    assert f"as configured: {own['hours']:.1f} to {own['hours_at_low_end']:.1f} h with" in text
    assert "at the expected rate of our own attention kernels, and at its low end" in text
    assert f"of that, audits: {own['audit_hours']:.1f} h (in 3 iterations" in text


REUSED = [
    "ode.reuse=residual",
    "ode.reuse_share=0.45",
    "ode.attention=int8",
    "ode.audit_every=20",
    "learn.window_steps=2",
]


def test_an_audit_takes_the_time_of_one_device_on_all() -> None:
    """For every member of one group an exact tail, two videos decoded, one scored; iterations as in training."""
    card = DEVICES["a800"]
    fast = load_config(Config, "paper_64xa800", REUSED)
    rows = RankRows.of(64, 12, LocalRanks())
    auditor = Auditor(fast, LocalRanks(), rows, {}, torch.device("cpu"))
    notes: dict[str, Any] = {}
    audited = [i for i in range(140) if auditor.due(i, notes, works=i > 0) is not None]
    assert audited == [1, 20, 40, 60, 80, 100, 120]  # the first shows the drift and is as good as exact
    tails = [21, 21, 20, 19, 18, 17, 17]  # the window moves on after 25 iterations; 25 steps, 4 of them in it
    for start, tail in enumerate((21, 20, 19)):
        sampler = FlowSampler(build_step_table(fast.flow, StepWindow(start, start + 4)), 12)
        assert auditor.passes(0, sampler) == 12 * tail
    run = run_cost(fast)
    # Exact attention, and frozen linears in bfloat16: what the paper's own run takes outside its window.
    paper = load_config(Config, "paper_64xa800")
    forward = run_cost(paper).outside(card, plan_with_levers(paper))
    decode, score = run.video.decode / card.convolution, sum(run.video.scorers.values()) / card.reward
    seconds = sum(12 * (tail * forward + 2 * decode + score) for tail in tails)
    assert audit_cost(fast, card) == (7, pytest.approx(seconds / 3600))
    alone = fast.model_copy(update={"ode": fast.ode.model_copy(update={"audit_every": 0})})
    assert audit_cost(alone, card) == (0, 0.0)
    for devices in (64, 32):  # the others wait, however many they are
        assert hours(fast, card, devices) - hours(alone, card, devices) == pytest.approx(seconds / 3600)
    guided = load_config(Config, "paper_64xa800", [*REUSED, "flow.guidance=5"])
    assert audit_cost(guided, card)[1] - seconds / 3600 == pytest.approx(sum(tails) * 12 * forward / 3600)
    # Audits of the first half see fewer tokens and frames.
    short = load_config(Config, "paper_64xa800", [*REUSED, "learn.short_frames=49", "learn.short_iterations=70"])
    assert audit_cost(short, card)[0] == 7 and audit_cost(short, card)[1] < 0.8 * seconds / 3600


def test_what_a_card_does_not_use_is_not_audited_and_not_priced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """8-bit attention does not pay on an H200, where every audit of it alone would compare exact with exact."""
    card, words = DEVICES["h200"], ["ode.attention=int8", "ode.audit_every=20"]
    alone, plain = (load_config(Config, "paper_64xa800", given) for given in (words, []))
    assert audit_cost(alone, card) == (0, 0.0) and hours(alone, card, 64) == hours(plain, card, 64)
    assert audit_cost(alone, DEVICES["a800"])[0] == 7
    both = load_config(Config, "paper_64xa800", [*words, "flow.tail_steps=9"])
    assert audit_cost(both, card)[0] == 7
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800", "--device", "h200", *words, "--json", str(file)]) == 0
    own = json.loads(file.read_text())["as_configured"]
    assert own["not_used"] == ["ode.attention"] and not own["changes_videos"] and own["audits"] == 0
    text = capsys.readouterr().out
    assert "not used on this card, where it does not pay: ode.attention" in text and "of them together" not in text


CHANGED = (
    "flow.tail_steps=9", "flow.tail_grid=sigma", "flow.tail_solver=dpm2m", "flow.tail_ratio=0.5",
    "ode.attention=int8", "ode.attention=int8 ode.int8_threshold=0.1", "ode.linears=int8", "ode.reuse=residual",
    "learn.window_steps=3", "optim.states=int8",
    "learn.short_frames=49 learn.short_iterations=70", "learn.members=6 levers.streaming=off",
    "rewards.hpsv3.options.frame_stride=4",
)  # fmt: skip


@pytest.mark.parametrize("setting", CHANGED)
def test_the_exact_form_undoes_what_changes_and_nothing_else(setting: str) -> None:
    words = setting.split()
    config = load_config(Config, "paper_64xa800", words)
    plain = load_config(Config, "paper_64xa800", [word for word in words if word.startswith("levers.")])
    named = {word.partition("=")[0] for word in words} - {"levers.streaming"}
    assert config.changes().keys() - {"ode.reuse_share"} == named
    before, after = flatten(plain.model_dump()), flatten(exactly(config).model_dump())
    # Every frame, and the option says so.
    assert after.pop("rewards.hpsv3.options.frame_stride", 1) == 1 and before == after
    assert exactly(config).changes() == {} and exactly(plain) == plain


def test_the_exact_form_keeps_settings_that_change_nothing() -> None:
    kept = ["ode.audit_spearman=0.9", "optim.lr=1e-5", "rewards.hpsv3.options.best_share=0.5"]
    config = load_config(Config, "paper_64xa800", [*kept, "ode.attention=int8", "ode.audit_every=20"])
    assert exactly(config) == load_config(Config, "paper_64xa800", kept)
    assert exactly(config.asked_for("x", ["run.seed=1"])).asked == "--config x run.seed=1"


def test_a_stride_counts_among_changes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told(*overrides: str) -> dict[str, Any]:
        file = tmp_path / "budget.json"
        assert main(["budget", "--config", "paper_64xa800", *overrides, "--json", str(file)]) == 0
        return json.loads(file.read_text())

    stride = "rewards.hpsv3.options.frame_stride=4"
    plain, seen = told(), told(stride)
    assert seen["hours"] == plain["hours"] and seen["changes"] == plain["changes"]
    assert seen["as_configured"]["settings"] == {"rewards.hpsv3.options.frame_stride": 4}
    (rung,) = (rung for rung in plain["changes"] if rung["settings"] == stride)
    assert seen["as_configured"]["hours"] == rung["hours"] < plain["hours"]["exact"]
    text = capsys.readouterr().out
    assert "fidelity of them together: videos as before" in text and "audits" not in text
    for value in ("0", "four"):
        assert main(["budget", "--config", "paper_64xa800", f"rewards.hpsv3.options.frame_stride={value}"]) == 2
        assert "frame_stride of the hpsv3 reward must be a whole number from 1" in capsys.readouterr().err


def row(**changes: Any) -> dict[str, Any]:
    """One of a fidelity table: of 5 steps by sigma with the paper's sampler, if not said otherwise."""
    made = {"approximations": dict(SIGMA5), "ladder": True, **PAPER, "window": 2}
    return made | {"spearman": 0.98, "spearman_p10": 0.95, "flips": 0.02, "accepted": True} | changes


PAPER = {"steps": 25, "shift": 5.0, "sde": "flow", "eta": 0.7, "eta_by_step": [], "guidance": 1.0, "t_dtype": "float32"}
SIGMA5 = {"flow.tail_grid": "sigma", "flow.tail_steps": "5", "flow.tail_solver": "dpm2m"}
ASKED = ("flow.tail_grid=sigma", "flow.tail_steps=5", "flow.tail_solver=dpm2m")


def test_fidelity_is_that_of_the_approximations_and_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(rows: list[dict[str, Any]], *overrides: str, name: str = "paper_64xa800") -> tuple[float | None, str]:
        monkeypatch.setattr(ladder, "fidelity_rows", lambda: rows)
        config = load_config(Config, name, overrides)
        known = ladder.measured(config)
        return known and known["spearman"], ladder.measured_elsewhere(config)

    assert found([row(), row(spearman=0.97, window=5)], *ASKED) == (0.97, "")
    assert found([row()], *ASKED, "ode.attention=int8") == (None, "")
    # Nothing is approximated: a control of precision says nothing of it.
    control = row(approximations={})
    assert found([control]) == found([control], "learn.window_steps=3") == (None, "")
    assert found([row(ladder=False)], *ASKED) == (None, "")
    int8 = row(approximations={"ode.attention": "int8"})
    assert found([int8], "ode.attention=int8") == (0.98, "")
    assert found([int8], "ode.attention=int8", "ode.int8_threshold=0.5") == (None, "")
    # Another sampler, and rows that do not say which.
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 20}, "T = 20"), ({"shift": 3.0}, "shift 3"), ({"sde": "cps"}, "cps SDE"), ({"eta": 1.0}, "eta 1"),
        ({"guidance": 5.0}, "guidance 5"), ({"t_dtype": "bfloat16"}, "timesteps in bfloat16"),
    )  # fmt: skip
    for other, word in others:
        assert found([row(**other)], *ASKED) == (None, word)
        assert found([row(**other), row()], *ASKED) == (0.98, "")
        silent = {key: value for key, value in row().items() if key not in other}
        assert found([silent], *ASKED) == (None, "")
    assert found([row(), row(shift=3.0)], *ASKED, name="tiny_cpu") == (
        None, "T = 25, shift 5, flow SDE, eta by step [] or T = 25, flow SDE, eta by step []",
    )  # fmt: skip
    fast = [row(steps=6, shift=3.0, sde="cps", eta_by_step=[1.0, 1.0, 0.8]), row()]
    assert found(fast, *ASKED, name="tiny_cpu") == (0.98, "")


def test_rungs_say_where_they_were_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ladder, "fidelity_rows", lambda: [row()])
    assert main(["budget", "--config", "paper_64xa800", "flow.steps=20", *ASKED]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line[2:50].strip(): line for line in lines if " CHANGES " in line}
    assert told["5 steps by sigma, second order"].endswith("measured at T = 25 only")
    assert told["5 steps by sigma, second order, int8"].endswith("not measured")
    assert "  fidelity of them together: measured at T = 25 only" in lines
    assert main(["budget", "--config", "paper_64xa800", *ASKED]) == 0
    out = capsys.readouterr().out
    assert "  fidelity of them together: Spearman 0.980, p10 0.95, signs changed 2.0 %, windows 2; not" in out
    # A sampler with guidance is another one: the embedded policy has none.
    assert main(["budget", "--config", "paper_64xa800", "flow.guidance=5", *ASKED]) == 0
    assert "fidelity of them together: measured at guidance 1 only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("windows", "overrides", "said"),
    [
        ((2, 5), (), "windows 2, 5"),
        ((2, 10), (), "windows 2; not measured at windows 3 to 5"),  # 10 is no window of this run
        ((10,), (), "windows 10"),  # better than nothing
        ((2, 10), ("window.interval=10",), "windows 2, 10; not measured at windows 11 to 13"),
    ],
)
def test_the_windows_of_a_fidelity_are_told(
    windows: tuple[int, ...], overrides: tuple[str, ...], said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The paper's run has windows from 0 to 5; with 10 iterations each, it would come to 13."""
    monkeypatch.setattr(ladder, "fidelity_rows", lambda: [row(window=window) for window in windows])
    assert main(["budget", "--config", "paper_64xa800", *overrides, *ASKED]) == 0
    line = capsys.readouterr().out.partition("fidelity of them together: ")[2]
    assert line.partition("assumed")[0].strip().endswith(said)


def test_a_rung_of_shorter_videos_does_not_say_that_videos_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    shorter = ["learn.short_frames=49", "learn.short_iterations=70"]
    assert main(["budget", "--config", "paper_64xa800", *shorter]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line[2:50].strip(): line for line in lines if " CHANGES " in line}
    said = "shorter videos in 70 of 140 iterations, of which fidelity says nothing; changes what is learned"
    assert told["49 frames in half of the iterations"].endswith(said)
    assert f"  fidelity of them together: {said}" in lines
    assert told["gradients of a random half of the window"].endswith("videos as before; changes what is learned")
    assert told["HPSv3 on every fourth frame"].endswith("videos as before; changes a reward")


def test_the_cheapest_pair_is_a_rung(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--config", "paper_64xa800", "--json", str(file)]) == 0
    spent = {rung["settings"]: rung["hours"] for rung in json.loads(file.read_text())["changes"]}
    pair = "flow.tail_grid=sigma flow.tail_steps=5 flow.tail_solver=dpm2m"
    assert spent[f"{pair} ode.attention=int8"] < min(
        spent[pair], spent["ode.reuse=residual ode.reuse_share=0.3 ode.attention=int8"]
    )


def test_a_small_model_is_told_that_seconds_mean_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "tiny_cpu"]) == 0
    text = capsys.readouterr().out
    assert "kernel launches" in text and "counted as free" in text


def test_more_devices_than_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--config", "paper_64xa800", "--devices", "100"]) == 2
    assert "1 to 64 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    ["7", "null", "{}", '{"t_ms_median": 1}',
     '{"t_ms_median": 1, "kind": "kernel", "impl": "ours", "gbps": "x", "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": NaN, "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": -5, "shape": [65520]}',
     '{"t_ms_median": 1, "kind": "ceiling", "name": "matmul", "impl": "torch", "tflops": 5, "shape": 3}'],
)  # fmt: skip
def test_a_result_file_of_another_form_is_refused(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    command = ["budget", "--config", "paper_64xa800", "--device", "h200", "--results", str(file)]
    file.write_text('{"device": "NVIDIA H200"}\n')
    assert main(command) == 0
    capsys.readouterr()
    file.write_text('{"device": "NVIDIA H200"}\n' + row + "\n")
    code, said = main(command), capsys.readouterr().err
    if row == "{}":  # nothing was timed
        assert code == 0
    else:
        assert code == 2 and said.count("\n") == 1 and f"{file}: not a result file of `make gpu`" in said


def timed(impl: str, direction: str, tflops: float) -> str:
    """A row of a result file of `make gpu`: self-attention of all tokens."""
    row = {"kind": "kernel", "name": "attention", "impl": impl, "direction": direction, "tflops": tflops, "gbps": None}
    return json.dumps(row | {"shape": [65_520, 65_520, 12, 128], "t_ms_median": 1.0, "status": "ok"})


def test_measurements_bring_the_core_that_they_were_made_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine of the file had no FlashAttention 3: its int8 is judged by the best core that was there."""
    file, out = tmp_path / "r.jsonl", tmp_path / "budget.json"
    command = ["budget", "--config", "paper_64xa800", "--device", "h200", "--results", str(file)]

    def told(rows: list[str], *more: str) -> dict[str, Any]:
        file.write_text("\n".join(['{"device": "NVIDIA H200"}', *rows]) + "\n")
        assert main([*command, *more, "--json", str(out)]) == 0
        return json.loads(out.read_text())

    rows = [timed("sdpa_flash", "fwd", 380), timed("sdpa_flash", "bwd", 310), timed("sdpa_cudnn", "fwd", 560),
            timed("sdpa_cudnn", "bwd", 290), timed("int8", "fwd", 600), timed("int8_fp8", "fwd", 650)]  # fmt: skip
    found = told(rows)
    assert found["core"] == "sdpa_cudnn" and found["cores_measured"] == ["sdpa_cudnn", "sdpa_flash"]
    assert found["rates"]["attention"] == {"tera_per_s": 560.0, "kind": "measured here"}
    assert found["rates"]["attention_int8"]["kind"] == "measured here"
    assert {mode: one["used"] for mode, one in found["quantised"].items()} == {"int8": False, "int8_fp8": True}
    settings = {rung["settings"]: rung for rung in found["changes"]}
    assert "ode.attention=int8_fp8" in settings and "ode.attention=int8" not in settings
    assert settings["ode.attention=int8_fp8"]["hours_at_low_end"] is None  # measured, so no range
    text = capsys.readouterr().out
    assert "attention by sdpa_cudnn" in text and "measured at full length: sdpa_cudnn, sdpa_flash" in text
    assert "int8 attention is left out: 1.07 times the rate of sdpa_cudnn; 1.15 wanted" in text
    assert told(rows, "--core", "sdpa_flash")["quantised"]["int8"]["used"]
    # cuDNN on an A800 has no published rate, and needs none here.
    file.write_text("\n".join(['{"device": "NVIDIA A800-SXM4-80GB"}', *rows[2:4]]) + "\n")
    assert main(["budget", "--config", "paper_64xa800", "--results", str(file), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["core"] == "sdpa_cudnn"
    # Cut short before any core: the int8 of that machine says nothing beside a published one.
    found = told([rows[4]])
    assert found["core"] == "flash3" and found["rates"]["attention_int8"]["kind"] == "modelled"
    capsys.readouterr()
    told(rows[:2])
    for more in (["--core", "flash3"], ["run.attention=flash3"]):
        assert main([*command, *more]) == 2
        assert "flash3 was not measured there; name one that was: --core sdpa_flash" in capsys.readouterr().err
