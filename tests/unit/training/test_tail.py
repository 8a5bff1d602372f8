"""Approximate tails in the loop: the ratio, the replay, resume and the counters are untouched; the audit sees them."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from training_cases import Brightness, Conditions, lively_policy, on_fake_ranks, smoke, trainer_of

from geoalign.config.schema import Config
from geoalign.errors import ConfigError, Refusal, RunError
from geoalign.jobs.pricing import run_cost
from geoalign.models import execution
from geoalign.models.dit import BlockResidual, RetakeDiT
from geoalign.perf.budget import Walk
from geoalign.policy.open import open_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.registry import build_rewards
from geoalign.training import setup
from geoalign.training.checkpoint import TrainState
from geoalign.training.drift import DRIFT
from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.modes import MODES
from geoalign.training.notes import under
from geoalign.training.processes.ranks import Ranks
from geoalign.training.tail import EXACT, OWED, Auditor
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
TAIL = {"steps": 10, "tail_grid": "sigma", "tail_steps": 5, "tail_solver": "dpm2m"}
ODE = {"attention": "int8", "int8_threshold": 0.5, "reuse": "residual", "reuse_share": 0.4}
AUDIT = {"audit_every": 2, "audit_action": "report"}
EVERYTHING: dict[str, Any] = {
    "window": WINDOW, "flow": TAIL, "ode": ODE | AUDIT, "advantage": {"weights": {}}, "groups": {"rows_per_forward": 2},
}  # fmt: skip
LESS: dict[str, Any] = {"learn": {"window_steps": 1, "members": 2}, "groups": {"rows_per_forward": 1}}
"""Beside everything: updates made of less, some steps of the window and some members."""


def trainer(ranks: Ranks | None = None, **changes: Any) -> Trainer:
    merged = {name: {**EVERYTHING.get(name, {}), **changes.get(name, {})} for name in {*EVERYTHING, *changes}}
    return trainer_of(smoke(**merged), ranks, rewards={"b": Brightness()})


@pytest.mark.parametrize("changes", [{}, {"levers": {"streaming": "graphs"}}, LESS], ids=str)
def test_everything_approximate_leaves_ratio_and_counters_alone(changes: dict[str, Any]) -> None:
    run = trainer(**changes)
    for iteration in range(3 if changes == {} else 2):
        metrics = run.step()
        assert metrics["parity/log_prob_diff_max"] == 0.0
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
        assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
        # 2 groups of 4: one prefix step and one window forward a group, one more window forward a row, then the tail:
        # all 5 steps in the first iteration, which measures the drift, and 2 of them from then on.
        assert metrics["perf/forwards_rollout"] == 2 + 2 + 8 + 8 * (5 if iteration == 0 else 2)
        audited = iteration > 0  # the one of iteration 0, which evaluates the whole tail, is made in the next
        assert metrics["perf/forwards_audit"] == (4 * (10 - 3) if audited else 0)
        assert ("fidelity/spearman" in metrics) == audited and metrics["fidelity/exact_tails"] == 0.0
    assert len(run.notes[DRIFT]["sigmas"]) == 5


def written(run: Trainer) -> TrainState:
    """The state of a run through the JSON of a checkpoint, which no further step changes."""
    state = run.state()
    kept = Snapshot(*({k: clone(v) for k, v in part.items()} for part in (
        state.snapshot.values, state.snapshot.average, state.snapshot.optimizer
    )))  # fmt: skip
    return replace(state, snapshot=kept, notes=json.loads(json.dumps(state.notes)))


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(after: int) -> None:
    """The drift is remembered, so no step is measured or chosen anew; so is an audit that was put off."""
    whole = trainer(**LESS)
    for _ in range(after):
        whole.step()
    state = written(whole)
    resumed = trainer(**LESS)
    resumed.load(state)
    first, second = whole.step(), resumed.step()
    assert "fidelity/spearman" in first and "fidelity/spearman" in second
    assert second["perf/forward_equivalents"] == second["perf/predicted_forward_equivalents"]
    same = [name for name in first if name.startswith(("reward", "policy", "fidelity", "advantage", "perf/forward"))]
    assert all(first[name] == second[name] for name in same) and len(same) > 20
    for name, value in whole.engine.trained.items():
        assert torch.equal(value, resumed.engine.trained[name]), name


def test_compiled_blocks_tail_off_as_eager_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse lies outside of the compiled block, int8 inside. Its graphs are traced, and run without a compiler."""
    traced = torch.compile(execution._eager, fullgraph=True, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(execution, "_compiled", lambda: traced)
    eager, compiled = trainer(), trainer(run={"compile": True})
    for step in range(2):
        there, here = eager.step(), compiled.step()
        assert here["parity/log_prob_diff_max"] == 0.0 and here["policy/ratio_max"] == 1.0
        counted = [name for name in there if name.startswith("perf/forward")]
        assert [here[name] for name in counted] == [there[name] for name in counted]
        # The graphs hold the same operators; float32 sums may be taken in another order, which an update may amplify.
        for name in ("reward/bright", "policy/grad_norm") if step == 0 else ():
            assert here[name] == pytest.approx(there[name], rel=1e-3), name
    assert compiled.notes[DRIFT]["drift"] == pytest.approx(eager.notes[DRIFT]["drift"], rel=1e-3)
    assert compiled.policy.model.execution.compiled and not eager.policy.model.execution.compiled


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else {k: clone(v) for k, v in value.items()}


BY_NEIGHBOURS = ("fidelity/distance", "fidelity/margin", "fidelity/bad")
"""Only members of one rank are compared with each other."""


def test_ranks_that_share_members_and_tokens_choose_and_audit_as_one_process_does() -> None:
    """Half of the group and half of the tokens each. int8 aside: each rank would settle it on its own rows."""
    settings: dict[str, Any] = {
        "ode": {"attention": "exact", "audit_every": 1},
        "groups": {"conditions": 1, "rows_per_forward": 1},
    }

    def run(ranks: Ranks | None, sequence: int) -> tuple[list[dict[str, float]], Any]:
        made = trainer(ranks, **settings, parallel={"sequence": sequence})
        return [made.step() for _ in range(2)], made.notes[DRIFT]

    alone, drift = run(None, 1)
    results = on_fake_ranks(4, lambda ranks: run(ranks, 2), 2)
    for numbers, found in results:
        # Sums over ranks in another order, and matrix products of other shapes.
        assert found["drift"] == pytest.approx(drift["drift"], rel=1e-4)
        for here, there in zip(numbers, alone, strict=True):
            assert here["perf/forward_equivalents"] == here["perf/predicted_forward_equivalents"]
            assert here["parity/log_prob_diff_max"] == 0.0
            for name in (name for name in there if name.startswith("fidelity/") and name not in BY_NEIGHBOURS):
                assert here[name] == pytest.approx(there[name], rel=2e-2, abs=1e-3), name
    assert sum(numbers[1]["perf/forwards_audit"] for numbers, _ in results) / 2 == alone[1]["perf/forwards_audit"] > 0


MARGIN_ALONE = {"audit_spearman": -1.0, "audit_bias": 1e9}
"""The default margin of 10 dB: 2 to 3 are seen of one step, 21 and more of six."""


def audited(action: str, bounds: dict[str, float] | None = None, sections: Any = None, **flow: Any) -> Trainer:
    """The shipped base under its own rewards: groups of eight, seven steps after the window."""
    ode = {"audit_every": 1, "audit_action": action} | (bounds or {})
    given = {"window": WINDOW, "flow": {"steps": 10, **flow}, "ode": ode, "groups": {"size": 8}} | (sections or {})
    config = smoke(**given)
    return Trainer(config, open_policy("builtin:tiny_base"), Conditions(config), build_rewards(config.rewards))


BAD = {"tail_steps": 1}
GOOD = {"tail_grid": "sigma", "tail_steps": 6}


@pytest.mark.parametrize(
    ("bounds", "found"), [({}, "spearman .*"), (MARGIN_ALONE, "group teaches: videos .* dB nearer .*")]
)
def test_the_audit_stops_a_tail_of_one_step_at_once(bounds: dict[str, float], found: str) -> None:
    run = audited("stop", bounds, **BAD)
    before = {name: value.clone() for name, value in run.engine.trained.items()}
    with pytest.raises(RunError, match=rf"iteration 0: .*{found}ode\.audit_spearman=.*flow\.tail_steps=1; take"):
        run.step()
    assert all(torch.equal(value, before[name]) for name, value in run.engine.trained.items())


@pytest.mark.parametrize("two", [False, True], ids=["alone", "two ranks"])
def test_a_refusal_leaves_its_numbers_and_the_state_before_the_iteration(two: bool) -> None:
    """On every rank alike; and the audit that is still owed, so that another start refuses as well.

    Two ranks in one process cannot tell whose window is open, in which int8 is refused.
    """
    bounds = MARGIN_ALONE | {"audit_margin": 1e3, "attention": "exact" if two else "int8"}
    settings: dict[str, Any] = {"ode": bounds | {"audit_action": "stop", "audit_every": 5}}

    def run(ranks: Ranks | None) -> tuple[str, dict[str, float]]:
        made = trainer(ranks, **settings)
        made.step()
        before = written(made)
        assert before.notes[OWED] == 0
        with pytest.raises(Refusal, match=r"iteration 1: .*nearer to the exact ones") as refused:
            made.step()
        error, after = refused.value, written(made)
        assert error.clean and error.repeats and error.iteration == after.iteration == 1
        assert error.numbers["fidelity/bad"] == 1 and "reward/bright" in error.numbers
        assert "policy/loss" not in error.numbers  # no update was taken
        assert after.notes == before.notes
        for part in ("values", "average", "optimizer"):
            torch.testing.assert_close(
                getattr(after.snapshot, part), getattr(before.snapshot, part), rtol=0, atol=0, equal_nan=True
            )
        again = trainer(ranks, **settings)
        again.load(after)
        with pytest.raises(Refusal) as repeated:
            again.step()
        same = [name for name in error.numbers if name.startswith(("reward", "fidelity", "advantage"))]
        assert [repeated.value.numbers[name] for name in same] == [error.numbers[name] for name in same]
        return str(error), dict(error.numbers)

    if two:
        (first, numbers), (second, others) = on_fake_ranks(2, run)
        assert first == second and numbers == pytest.approx(others, nan_ok=True)
    else:
        run(None)


def test_advice_holds_what_it_takes() -> None:
    run = audited("stop", **BAD)
    object.__setattr__(run.auditor, "config", run.config.asked_for("smoke", ["flow.tail_steps=1"]))
    with pytest.raises(RunError, match=r"run --config smoke flow\.tail_steps=1 --json FILE.*--allow-config-change$"):
        run.step()


def test_the_audit_passes_a_good_tail() -> None:
    metrics = audited("stop", **GOOD).step()
    assert metrics["fidelity/spearman"] >= 0.9 and metrics["perf/forwards_audit"] == 8 * 7
    assert metrics["fidelity/margin"] == metrics["fidelity/psnr"] - metrics["fidelity/distance"] > 15
    assert metrics["fidelity/bad"] == 0.0


@pytest.mark.parametrize("bounds", [{}, MARGIN_ALONE])
def test_a_bad_reuse_is_caught_in_the_iteration_after_its_drift_was_measured(bounds: dict[str, float]) -> None:
    run = audited("stop", {"reuse": "velocity", "reuse_share": 0.01, "audit_every": 5} | bounds)
    first = run.step()
    assert first["perf/forwards_rollout"] == 2 + 2 + 16 + 16 * 7 and "fidelity/spearman" not in first
    assert first["perf/forward_equivalents"] == first["perf/predicted_forward_equivalents"]
    state = written(run)
    reported = audited("report", {"reuse": "velocity", "reuse_share": 0.01, "audit_every": 5} | bounds)
    reported.load(state)
    rows = [reported.step() for _ in range(2)]
    assert [row["perf/forwards_audit"] for row in rows] == [8 * 7, 0] and rows[0]["fidelity/bad"] > 0
    assert all(row["perf/forward_equivalents"] == row["perf/predicted_forward_equivalents"] for row in rows)
    run.load(state)
    with pytest.raises(RunError, match=r"iteration 1: .*ode\.reuse_share=0\.01; take"):
        run.step()


def spoiled(policy: RetakePolicy) -> RetakePolicy:
    """With deterministic steps that are NaN, and window and audit as they were."""
    broken = copy.deepcopy(policy.model)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(torch.nan)
    return replace(policy, fast=broken)


FIRST = {"window": {"kind": "fixed", "start": 0, "size": 2, "max_start": None}, "failures": {"max_invalid_fraction": 1}}
"""No step before the window, and a run that goes on with invalid samples."""


def test_a_tail_that_makes_a_group_nan_is_bad() -> None:
    run = audited("stop", sections=FIRST, **GOOD)
    run.policy = spoiled(run.policy)
    with pytest.raises(RunError, match=r"iteration 0: .*no spearman \(NaN\), no bias_.*, no margin \(NaN\) \(bounds"):
        run.step()


def exact_ends(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], None]) -> None:
    """Change what the exact tail of an audit ends in."""
    finish = Auditor._finish

    def changed(self: Auditor, *args: Any) -> tuple[Tensor, int]:
        final, spent = finish(self, *args)
        spoil(final)
        return final, spent

    monkeypatch.setattr(Auditor, "_finish", changed)


def test_one_member_that_is_nan_exactly_switches_no_bound_off(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_ends(monkeypatch, lambda final: final[3].fill_(torch.nan))
    with pytest.raises(RunError, match=r"iteration 0: .*group teaches: videos .* dB nearer .*flow\.tail_steps=1; take"):
        audited("stop", MARGIN_ALONE, **BAD).step()
    row = audited("stop", **GOOD).step()
    assert row["fidelity/spearman"] >= 0.9 and row["fidelity/margin"] > 15 and row["fidelity/bad"] == 0


@pytest.mark.parametrize("left", ["two", "equal"])
def test_where_the_exact_tail_leaves_nothing_to_compare_nothing_is_bad(
    left: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact_ends(monkeypatch, lambda f: f[2:].fill_(torch.nan) if left == "two" else f.copy_(f[:1].expand_as(f)))
    run = audited("stop", {"audit_margin": None, "audit_bias": 1e9}, **BAD)
    with caplog.at_level(logging.INFO):
        row = run.step()
    assert row["fidelity/bad"] == 0.0 and math.isnan(row["fidelity/spearman"])
    assert "audit of group 0: no spearman, " in caplog.text and "fewer than 3 members that differ" in caplog.text


def test_after_a_bad_audit_the_run_goes_on_exactly_and_remembers_it(caplog: pytest.LogCaptureFixture) -> None:
    run = audited("exact", **BAD)
    with caplog.at_level(logging.WARNING):
        first = run.step()
    assert "from here on the tails are exact" in caplog.text and run.notes[EXACT] == 0
    assert first["fidelity/exact_tails"] == 0.0
    second = run.step()
    assert first["perf/forwards_rollout"] == 2 + 2 + 16 + 16 and second["perf/forwards_rollout"] == 2 + 2 + 16 + 16 * 7
    assert second["perf/forward_equivalents"] == second["perf/predicted_forward_equivalents"]
    assert "fidelity/spearman" not in second and second["fidelity/exact_tails"] == 1.0
    state = written(run)
    for notes in (state.notes, {k: v for k, v in state.notes.items() if k != under(EXACT)}):  # and of before this
        resumed = audited("exact", **BAD)
        resumed.load(replace(state, notes=notes))
        assert resumed.step()["perf/forwards_rollout"] == 2 + 2 + 16 + 16 * 7
    changed = audited("exact", **GOOD)
    with caplog.at_level(logging.INFO):
        changed.load(state)
    assert "fall back to exact tails is dropped" in caplog.text and "flow.tail_steps 1 -> 6" in caplog.text
    row = changed.step()
    assert row["perf/forwards_rollout"] == 2 + 2 + 16 + 16 * 6 and row["fidelity/exact_tails"] == 0.0
    assert row["fidelity/spearman"] >= 0.9
    unwatched = audited("exact", {"audit_every": 0}, **BAD)  # which no bound was found under
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        unwatched.load(state)
    assert "stay exact, because the audit of iteration 0 was bad" in caplog.text
    assert unwatched.step()["fidelity/exact_tails"] == 1.0
    for other in (audited("report", **BAD), audited("exact", MARGIN_ALONE | {"audit_margin": None}, **BAD)):
        other.load(state)
        assert other.step()["fidelity/exact_tails"] == 0.0


def test_a_fall_back_on_short_videos_is_not_one_on_long_ones() -> None:
    """The network that approximates is there again, with the layers that were chosen before the fall back."""
    settings: dict[str, Any] = {"learn": {"short_frames": 3, "short_iterations": 3}}
    settings |= {"ode": {"audit_every": 1, "audit_action": "exact", "audit_margin": 1e3}}
    run = trainer(**settings)
    rows, states = [], []
    for _ in range(5):
        states.append(written(run))
        rows.append(run.step())
    # Measured; approximate and audited; exact; then of full length measured, approximate and audited again.
    assert [row["fidelity/exact_tails"] for row in rows] == [0, 0, 1, 0, 0]
    assert [row["perf/forwards_rollout"] for row in rows] == [MEASURED, CHOSEN, 12 + 8 * 7, MEASURED, CHOSEN]
    assert ["fidelity/bad" in row for row in rows] == [False, True, False, False, True]
    assert all(row["perf/forward_equivalents"] == row["perf/predicted_forward_equivalents"] for row in rows)
    for start in (2, 3):
        resumed = trainer(**settings)
        resumed.load(states[start])
        for row in rows[start:]:
            again = resumed.step()
            same = [name for name in row if name.startswith(("reward", "policy", "fidelity", "perf/forward"))]
            assert all(again[name] == row[name] for name in same) and len(same) > 10


def test_a_profile_from_a_file_serves_the_first_iteration(tmp_path: Path) -> None:
    measured = trainer()
    measured.step()
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(measured.notes[DRIFT] | {"reuse": "residual"}))
    run = trainer(ode={"reuse_profile": file})
    assert run.step()["perf/forwards_rollout"] == 2 + 2 + 8 + 8 * 2
    assert run.notes[DRIFT] == measured.notes[DRIFT]
    file.write_text('{"sigmas": [0.5]}')
    with pytest.raises(
        ConfigError,
        match=r"profile.json: drift: Field required; make it with `geoalign fidelity choose .* --out .*json`",
    ):
        trainer(ode={"reuse_profile": file})
    file.write_text(json.dumps({"sigmas": [0.4, 0.2], "drift": [0.0, 1.0], "reuse": "residual"}))
    with pytest.raises(ConfigError, match=r"profile.json: begins at the noise level 0.4, below 0\.\d+, where the earl"):
        trainer(ode={"reuse_profile": file})


def test_a_profile_is_its_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another one under the same name is read, and lifts a fall back; the same one under another name is the same."""
    measured = trainer()
    measured.step()
    file, copied = tmp_path / "profile.json", tmp_path / "copied.json"
    file.write_text(json.dumps(measured.notes[DRIFT] | {"reuse": "residual", "base": "another"}))
    ode = {"reuse_profile": file, "audit_every": 1, "audit_action": "exact", "audit_margin": 1e3}
    with caplog.at_level(logging.WARNING):
        run = trainer(ode=ode)
    assert "measured on the policy another, and the run starts from" in caplog.text
    run.step()
    assert run.notes[EXACT] == 0
    state = written(run)
    copied.write_text(file.read_text())
    file.write_text(json.dumps(measured.notes[DRIFT] | {"drift": [0.0, 0.1, 0.2, 0.3, 0.4]}))
    same, other = trainer(ode=ode | {"reuse_profile": copied}), trainer(ode=ode)
    for each in (same, other):
        each.load(state)
    row = same.step()
    assert row["fidelity/exact_tails"] == 1.0 and same.notes[DRIFT] == measured.notes[DRIFT]
    row = other.step()
    assert row["fidelity/exact_tails"] == 0.0 and other.notes[DRIFT]["drift"] == [0.0, 0.1, 0.2, 0.3, 0.4]


MEASURED, CHOSEN = 2 + 2 + 8 + 8 * 5, 2 + 2 + 8 + 8 * 2
"""Forwards of a rollout that measures the drift, and of one whose steps are chosen."""


def test_a_drift_of_something_else_is_dropped_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer()
    run.step()
    state, file = written(run), tmp_path / "profile.json"
    file.write_text(json.dumps(run.notes[DRIFT] | {"drift": [0.0, 0.1, 0.2, 0.3, 0.4]}))

    def resumed(notes: Any = None, **ode: Any) -> tuple[Trainer, float, str]:
        caplog.clear()
        other = trainer(ode=ode)
        with caplog.at_level(logging.INFO):
            other.load(replace(state, notes=notes or state.notes))
            spent = other.step()["perf/forwards_rollout"]
        return other, spent, caplog.text

    other, spent, said = resumed(reuse="velocity")
    assert spent == MEASURED and other.notes[DRIFT] != run.notes[DRIFT]
    assert "drift of ode.reuse is dropped" in said and 'ode.reuse "residual" -> "velocity"' in said
    other, spent, said = resumed(reuse_profile=file)
    assert spent == CHOSEN and other.notes[DRIFT]["drift"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert 'from "measured" -> "the file ' in said
    _, spent, said = resumed(int8_threshold=0.4)
    assert spent == CHOSEN and "choice of 8-bit layers is dropped" in said and "ode.int8_threshold 0.5 -> 0.4" in said
    older = {name: value for name, value in state.notes.items() if not name.endswith("_under")}
    for notes in (None, older):
        other, spent, said = resumed(notes)
        assert spent == CHOSEN and other.notes[DRIFT] == run.notes[DRIFT] and "dropped" not in said


def test_drift_and_8_bit_layers_are_measured_again_at_full_length(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"learn": {"short_frames": 3, "short_iterations": 2}, "ode": {"audit_every": 1}}
    run = trainer(**settings)
    spent, drift, probes, states = [], [], [], []
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            states.append(written(run))
            row = run.step()
            assert row["perf/forward_equivalents"] == row["perf/predicted_forward_equivalents"]
            spent.append((row["perf/forwards_rollout"], "fidelity/spearman" in row))
            drift.append(run.notes[DRIFT])
            assert run.policy.fast is not None and run.notes[MODES] == ["int8"] * run.config.model.layers
            probes.append(run.policy.fast.execution.probe)
    assert spent == [(MEASURED, False), (CHOSEN, True)] * 2
    assert drift[0] == drift[1] != drift[2] == drift[3]
    assert probes[0] is probes[1] is not probes[2] is probes[3]
    assert probes[2] is not None and len(probes[2].errors) == run.config.model.layers
    assert [caplog.text.count(f"{what} is dropped") for what in ("drift of ode.reuse", "choice of 8-bit layers")] == [
        1,
        1,
    ]
    for start in (1, 2, 3):  # before, at and after the first long iteration
        resumed = trainer(**settings)
        resumed.load(states[start])
        again = [resumed.step() for _ in range(4 - start)]
        assert [row["perf/forwards_rollout"] for row in again] == [forwards for forwards, _ in spent[start:]]
        assert resumed.notes[DRIFT] == run.notes[DRIFT] and resumed.notes[MODES] == run.notes[MODES]


def test_ranks_measure_the_long_videos_together() -> None:
    settings: dict[str, Any] = {"learn": {"short_frames": 3, "short_iterations": 1}, "ode": {"attention": "exact"}}

    def run(ranks: Ranks | None) -> dict[str, Any]:
        made = trainer(ranks, **settings)
        for _ in range(2):
            made.step()
        return made.notes[DRIFT] | made.notes[under(DRIFT)]

    alone, (first, second) = run(None), on_fake_ranks(2, run)
    assert first == second and alone["frames"] == first["frames"] == 5
    assert first["drift"] == pytest.approx(alone["drift"], rel=1e-4)  # sums in another order


SLIDING: dict[str, Any] = {
    "window": {"kind": "progressive", "start": 1, "size": 2, "stride": 3, "interval": 1, "end": "roll_back"},
    "flow": {"steps": 10, "tail_grid": "schedule", "tail_steps": None, "tail_solver": "euler"},
    "ode": {"attention": "exact", "audit_every": 2},
    "learn": {"short_frames": 3, "short_iterations": 2},
}  # fmt: skip
"""Windows that end at 3, 6 and 9 of ten steps, again and again; long videos begin where one step is left."""


def test_an_earlier_window_is_measured_anew_and_one_step_never() -> None:
    """The whole run against the price, iteration by iteration: the walks, and what is audited."""
    run = trainer(train={"iterations": 8}, **SLIDING)
    rows, states = [], []
    for _ in range(8):
        states.append(written(run))
        rows.append(run.step())
        assert rows[-1]["perf/forward_equivalents"] == rows[-1]["perf/predicted_forward_equivalents"]
        assert rows[-1]["parity/log_prob_diff_max"] == 0.0
    starts, tails = [1, 4, 7, 1, 4, 7, 1, 4], [7, 4, 1, 7, 4, 1, 7, 4]
    assert [row["window/start"] for row in rows] == starts
    # Of short videos the first is measured; of long ones the one step is not, and the seven of the next are.
    taken = [7, 2, 1, 7, 2, 1, 3, 2]
    assert [row["perf/forwards_rollout"] for row in rows] == [
        2 * start + 2 + 8 + 8 * tail for start, tail in zip(starts, taken, strict=True)
    ]
    audits = [0, 4, 0, 0, 4, 0, 7, 0]  # due at 0, 2, 4 and 6; that of 0 is made at 1, and that of 2 is that of 4
    assert [row["perf/forwards_audit"] for row in rows] == [4 * steps for steps in audits]
    priced = run_cost(run.config)
    assert priced.walks == {
        Walk(start, 2, tail): [*zip(starts, taken, strict=True)].count((start, tail))
        for start, tail in zip(starts, taken, strict=True)
    }
    assert priced.audits == {4: 2, 7: 1} and tails == [10 - 2 - start for start in starts]
    resumed = trainer(train={"iterations": 8}, **SLIDING)
    resumed.load(states[2])  # with an audit that is owed, before the one step that shows no drift
    again = [resumed.step() for _ in range(6)]
    assert [row["perf/forwards_rollout"] for row in again] == [row["perf/forwards_rollout"] for row in rows[2:]]
    assert again[-1]["policy/grad_norm"] == rows[-1]["policy/grad_norm"]


def test_a_late_window_is_no_measure_for_an_early_one() -> None:
    """A random schedule that begins late: what its tail shows does not say what an earlier one does."""
    run = trainer(**{name: value for name, value in SLIDING.items() if name != "learn"})
    run.iteration = 1  # its window ends at 6
    run.step()
    late = run.notes[DRIFT]
    run.iteration = 3  # and this one at 3
    run.step()
    assert len(late["sigmas"]) == 4 and len(run.notes[DRIFT]["sigmas"]) == 7
    assert run.notes[DRIFT]["sigmas"][3:] == late["sigmas"]


@pytest.mark.parametrize("why", ["card", "layers"])
def test_an_audit_of_nothing_is_not_made(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit attention that does not pay on the card, which the audit waits for, or that no layer bears."""
    card = why == "card"
    ode = {"reuse": "off", "audit_every": 5 if card else 1, "int8_threshold": 0.5 if card else 1e-12}
    settings: dict[str, Any] = {"flow": SLIDING["flow"], "ode": ode}
    if card:
        choose = setup.choose
        monkeypatch.setattr(setup, "choose", lambda *given, **named: replace(choose(*given, **named), quantised=False))
    run = trainer(**settings)
    rows = [run.step() for _ in range(2)]
    # In the first iteration layers are still being chosen.
    assert [row["perf/forwards_audit"] for row in rows] == [0 if card else 4 * 7, 0]
    assert run.notes[OWED] == (0 if card else 1) and rows[1]["fidelity/exact_tails"] == 0.0
    assert all(row["perf/forward_equivalents"] == row["perf/predicted_forward_equivalents"] for row in rows)
    if card:
        monkeypatch.undo()
        paying = trainer(**settings)
        paying.load(written(run))
        assert paying.step()["perf/forwards_audit"] == 4 * 7


def test_an_audit_of_exact_tails_is_refused() -> None:
    with pytest.raises(ValidationError, match="every step is exact"):
        smoke(ode={"audit_every": 3})


@pytest.mark.parametrize("guided", [False, True])
def test_a_residual_stands_for_the_blocks(guided: bool) -> None:
    """At the state it was made of it gives the same velocity, elsewhere that of a network whose blocks add the same."""
    config: Config = smoke(model={"text_length": 6} if guided else {})
    policy = lively_policy(config, torch.float64)
    model, batch = policy.model.requires_grad_(False), Conditions(config, torch.float64).batch(0, [0, 1])
    text = torch.randn(2, 6, config.model.text_dim, dtype=torch.float64)
    conditioning = policy.condition(replace(batch, encodings=Encodings(context=text)) if guided else batch)
    if guided:
        conditioning = replace(conditioning, context=text, negative=text.flip(0))
    cache = model.precompute(conditioning)
    x, time = torch.randn(2, *policy.latent_shape(batch), dtype=torch.float64), torch.tensor([600.0, 600.0]).double()
    kept = BlockResidual()
    made = model(x, time, conditioning, cache, kept)
    assert torch.equal(made, model(x, time, conditioning, cache))
    # A difference and a sum in float64.
    torch.testing.assert_close(model(x, time, conditioning, cache, kept), made, rtol=0, atol=1e-12)
    moved, later = x + 0.3, time - 50.0
    with pytest.MonkeyPatch.context() as patch:
        blocks = lambda self, h, *rest: (h.repeat(2, 1, 1) if guided else h)[:, : kept.value.shape[1]] + kept.value  # type: ignore[union-attr]  # noqa: E731
        patch.setattr(RetakeDiT, "_blocks", blocks)
        expected = model(moved, later, conditioning, cache)
    torch.testing.assert_close(model(moved, later, conditioning, cache, kept), expected, rtol=0, atol=1e-12)
