"""What stands beside a trace is the work of that very iteration: against the passes that it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from training_cases import Brightness, smoke, trainer_of

from geoalign.jobs import train_profile
from geoalign.jobs.train_profile import expected_work
from geoalign.perf.budget import Plan, Walk, count_passes
from geoalign.perf.cost import Speedups, TransformerCost
from geoalign.perf.devices import DEVICES
from geoalign.perf.phases import phase_work
from geoalign.training.tail import EXACT
from geoalign.training.trainer import Trainer

TAIL = {"steps": 10, "tail_grid": "sigma", "tail_steps": 5, "tail_solver": "dpm2m"}
CHEAP: dict[str, Any] = {
    "window": {"kind": "fixed", "start": 1, "size": 2, "max_start": None}, "advantage": {"weights": {}}, "flow": TAIL,
    "ode": {"attention": "int8", "int8_threshold": 0.5, "reuse": "residual", "reuse_share": 0.4},
    "learn": {"window_steps": 1, "members": 2}, "groups": {"rows_per_forward": 1},
}  # fmt: skip


def trainer(**changes: Any) -> Trainer:
    return trainer_of(smoke(**{**CHEAP, **changes}), rewards={"b": Brightness()})


def passes(run: Trainer, work: dict[str, Any], frames: int) -> tuple[float, float, float]:
    """Forwards of the rollout and of the learner, and backwards, from FLOPs; nothing is recomputed or streamed."""
    cost = TransformerCost.of(run.config.model, frames, *run.config.data.video[1:])
    flops = {phase: of["flops"] for phase, of in work["phases"].items()}
    rollout = sum(value for phase, value in flops.items() if phase.startswith("rollout/"))
    forward, backward = cost.forward_flops(), cost.backward_flops()
    return rollout / forward, flops["update/forward"] / forward, flops["update/backward"] / backward


def test_the_work_is_that_of_the_passes_of_the_iteration() -> None:
    """The first one evaluates its whole tail, later ones reuse; all learn from one step that is drawn; the last one
    comes after a fall back to exact steps."""
    run, found = trainer(), []
    for iteration in range(3):
        if iteration == 2:
            run.notes[EXACT] = 1
        work: dict[str, Any] = expected_work(run)
        metrics = run.step()
        counted = [metrics[f"perf/{name}"] for name in ("forwards_rollout", "forwards_learner", "backwards")]
        assert passes(run, work, run.config.data.num_frames) == pytest.approx(counted)
        found.append(counted[0])
    assert found == [12 + 8 * 5, 12 + 8 * 2, 12 + 8 * 7]


def test_int8_attention_is_counted_where_a_probe_may_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after a fall back, nor of a twin that has 8-bit linears alone."""
    card = DEVICES["a800"]
    monkeypatch.setattr(train_profile, "profile_of", lambda name: card)
    run = trainer()

    def tail() -> float:
        work: dict[str, Any] = expected_work(run)
        return work["phases"]["rollout/tail"]["seconds"]

    both = tail()
    assert run.policy.fast is not None and run.policy.fast.execution.probe is not None
    run.policy.fast.execution.probe = None
    without = tail()
    assert both < without
    run = trainer()
    run.notes[EXACT] = 1
    assert tail() == pytest.approx(without * 7 / 5)  # seven steps of the time grid in place of five, exact ones again


def test_8_bit_linears_are_priced_outside_the_window_alone() -> None:
    card, cost, speedups = DEVICES["a800"], TransformerCost(), Speedups("fused", cached=True)
    plan, walk = Plan(speedups), Walk(2, 4, 19)
    plain, fast = (
        phase_work(cost, p, walk, 1, 12, 1, card) for p in (plan, plan.after_window(attention="exact", linears=True))
    )
    count = count_passes(walk, 1, 12, 1, plan)
    each = cost.forward(card, replace(speedups, int8_linear=True), no_gradient=True).total
    assert fast["rollout/tail"].seconds == pytest.approx(count.tail * each) and plain != fast
    assert fast["rollout/window"] == plain["rollout/window"] and fast["update/backward"] == plain["update/backward"]


def test_the_expected_work_is_that_of_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short videos, learned steps and reused ones count, and 8-bit attention where it runs, not where a twin exists."""
    asked: list[dict[str, Any]] = []

    def spy(cost: Any, plan: Any, walk: Any, *sizes: Any) -> dict[str, Any]:
        asked.append({"tokens": cost.tokens, "mode": plan.attention, "linears": plan.int8_linears,
                      "tail": walk.tail, "positions": sizes[-1]})  # fmt: skip
        return {}

    monkeypatch.setattr(train_profile, "phase_work", spy)
    changes: dict[str, Any] = {
        "advantage": {"weights": {}}, "learn": {"window_steps": 1},
        "ode": {"attention": "int8", "reuse": "velocity", "reuse_share": 0.5},
    }  # fmt: skip
    run = trainer_of(smoke(**changes), rewards={"b": Brightness()})
    train_profile.expected_work(run)
    run.step()
    train_profile.expected_work(run)
    first, second = asked
    assert first["mode"] == second["mode"] == "int8" and len(first["positions"]) == len(second["positions"]) == 1
    left = [run.config.flow.steps - run.schedule(iteration).stop for iteration in (0, 1)]
    reused = run.config.ode.evaluated(left[1])
    assert (first["tail"], second["tail"]) == (left[0], reused) and reused < left[1]  # the first measures the drift
    assert run.policy.fast is not None
    run.policy.fast.execution.probe = None  # as of a twin whose linears alone are 8-bit
    train_profile.expected_work(run)
    assert asked[-1]["mode"] == "exact" and not asked[-1]["linears"]
    learn = {"short_frames": 3, "short_iterations": 1}
    short = trainer_of(smoke(advantage={"weights": {}}, learn=learn), rewards={"b": Brightness()})
    train_profile.expected_work(short)
    short.iteration = 1
    train_profile.expected_work(short)
    size = short.config.data.video[1:]
    assert [each["tokens"] for each in asked[-2:]] == [sum(short.config.model.tokens(n, *size)) for n in (3, 5)]
