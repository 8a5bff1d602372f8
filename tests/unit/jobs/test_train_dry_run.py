"""What `train --dry-run` says of a run: everything that CHANGES it, and what an audit takes."""

from __future__ import annotations

import itertools
import math
import re
import statistics

import pytest

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs.train_dry_run import describe_run
from geoalign.perf.budget import Walk, count_passes
from geoalign.training.telemetry import plan_of


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("flow.eta=0.7", "; all EXACT"),
        ("optim.states=int8", "; CHANGES: optim.states int8"),
        ("rewards.hpsv3.options.frame_stride=2", "; CHANGES: rewards.hpsv3.options.frame_stride 2"),
        ("rewards.hpsv3.options.frame_stride=1", "; all EXACT"),
        ("learn.window_steps=3", "; CHANGES: learn.window_steps 3"),
    ],
)
def test_what_changes_a_run_is_named(setting: str, said: str) -> None:
    told = describe_run(load_config(Config, "paper_64xa800", [setting]))
    assert str(told["execution"]).endswith(said) and "audit" not in str(told["passes"])


def numbers_of(told: object) -> list[int]:
    return [int(word.replace(",", "")) for word in re.findall(r"[\d,]*\d", str(told))]


@pytest.mark.parametrize("settings", [(), ("levers.streaming=off",), ("levers.streaming=off", "learn.members=6")])
def test_learned_steps_are_counted_as_the_mean_over_all_that_may_be_drawn(settings: tuple[str, ...]) -> None:
    """Against every subset, counted one by one: those with the first step are cheaper where it is merged."""
    config = load_config(Config, "paper_64xa800", ["learn.window_steps=2", *settings])
    walk, plan, updates = Walk(0, 4, 21), plan_of(config), config.optim.updates_per_rollout
    counts = [count_passes(walk, 64, 12, updates, plan, chosen) for chosen in itertools.combinations(range(4), 2)]
    rollout, forwards, backwards, recomputed = numbers_of(describe_run(config)["passes"])[:4]
    assert rollout == counts[0].rollout
    means = [
        statistics.fmean(values) for values in zip(*((c.replay, c.backward, c.recompute) for c in counts), strict=True)
    ]
    assert [forwards, backwards, recomputed] == pytest.approx(means)
    assert "mean over the steps that are drawn" in str(describe_run(config)["passes"])


def test_steps_that_are_not_evaluated_are_not_counted() -> None:
    """0.45 of 21 steps behind the first window, rounded up, are 10; the iteration that chooses them evaluates all."""
    told = describe_run(load_config(Config, "paper_64xa800", ["ode.reuse=residual", "ode.reuse_share=0.45"]))
    assert "25 steps, of which the first window evaluates 14" in str(told["iteration"])
    first, *_, all_steps = numbers_of(told["passes"])
    assert all_steps - first == 64 * 12 * 11 and "first iteration evaluates all steps" in str(told["passes"])
    known = describe_run(load_config(Config, "paper_64xa800", ["ode.reuse=residual", "ode.reuse_profile=d"]))
    assert "first iteration" not in str(known["passes"])
    coarse = describe_run(load_config(Config, "paper_64xa800", ["flow.tail_grid=sigma", "flow.tail_steps=5"]))
    assert str(coarse["iteration"]).endswith("25 steps, of which the first window evaluates 9")
    short = ["learn.short_frames=49", "learn.short_iterations=70"]
    videos = str(describe_run(load_config(Config, "paper_64xa800", short))["videos"])
    assert videos == "81 x 480 x 832, of 49 frames in the first 70 iterations"
    plain = describe_run(load_config(Config, "paper_64xa800"))
    assert str(plain["iteration"]).endswith("25 steps") and plain["videos"] == "81 x 480 x 832"
    assert str(plain["passes"]).endswith("(first window, all ranks)")


def test_the_passes_of_an_audit_are_named() -> None:
    """The first window ends at step 4: 21 steps for each of 12 members; twice that with two prompts a step.

    An audit is not the learner's: it learns from 3 of 4 steps, the first of which the 64 groups replay as one pass.
    """
    for guidance, forwards, learner in ((1, 252, 48), (5, 504, 96)):
        for every in (50, 0):
            settings = [f"flow.guidance={guidance}", f"ode.audit_every={every}"]
            told = str(describe_run(load_config(Config, "paper_64xa800_fast", settings))["passes"])
            assert f", {learner} learner forwards, " in told
            assert (f", {forwards} in an audit every 50 iterations" in told) == (every > 0)


def one_by_one(config: Config) -> list[int]:
    """Forwards of the rollout, forwards, backwards and repeated forwards of the learner, counted pass by pass."""
    levers, groups, updates = config.levers, config.groups, config.optim.updates_per_rollout
    start, stop = config.window.start, config.window.start + config.window.size
    tail = config.flow.steps - stop
    tail -= tail - math.ceil(config.ode.reuse_share * tail) if config.ode.reuse != "off" else 0
    rollout = learner = backwards = repeated = 0
    for _ in range(groups.conditions):
        for member in range(groups.size):
            alone = not levers.share_prefix or member == 0
            rollout += (start + 1) * alone + (stop - start - 1) + tail
        for _ in range(updates):
            for position in range(stop - start):
                merged = position == 0 and levers.merge_first_step
                for _ in range(1 if merged else groups.size // updates):
                    streamed = levers.streaming == "graphs" or (levers.streaming != "off" and not merged)
                    learner += (not streamed) + (config.objective.kl_weight > 0)
                    backwards += 1
                    repeated += levers.recompute != "none"
    prompts = 2 if config.flow.guidance > 1 else 1
    return [prompts * count for count in (rollout, learner, backwards, repeated)]


@pytest.mark.parametrize("audited", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        ("levers.streaming=host",),
        ("levers.streaming=graphs", "flow.guidance=5"),
        ("levers.streaming=device", "window.start=3", "levers.recompute=none"),
        ("levers.streaming=off", "optim.updates_per_rollout=3"),
        ("levers.streaming=off", "objective.kl_weight=0.1", "levers.merge_first_step=false"),
        ("levers.streaming=off", "levers.share_prefix=false", "levers.merge_first_step=false", "window.start=2"),
        ("levers.streaming=host", "ode.reuse=residual", "ode.reuse_share=0.45", "ode.reuse_profile=d"),
    ],
)
def test_every_number_of_the_passes_is_that_of_a_count_one_by_one(settings: tuple[str, ...], audited: bool) -> None:
    audit = ("ode.attention=int8", "ode.audit_every=50") if audited else ()
    config = load_config(Config, "paper_64xa800", [*settings, *audit])
    told = describe_run(config)
    numbers = numbers_of(told["passes"])
    assert numbers[:4] == one_by_one(config)
    exact = config.flow.steps - config.window.start - config.window.size
    assert numbers[4:] == ([(2 if config.flow.guidance > 1 else 1) * 12 * exact, 50] if audited else [])
    assert numbers_of(told["iteration"])[:3] == [64, 12, 25]
    ranks, groups, members = numbers_of(told["processes"])
    assert ranks * groups * members == 64 * 12
