"""What `train --dry-run` says of a run: everything that CHANGES it, and what an audit takes."""

from __future__ import annotations

import itertools
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
    """The first window ends at step 4: 21 steps for each of 12 members; twice that with two prompts a step."""
    for guidance, forwards in ((1, 252), (5, 504)):
        told = describe_run(load_config(Config, "paper_64xa800_fast", [f"flow.guidance={guidance}"]))
        assert f", {forwards} in an audit every 50 iterations" in str(told["passes"])
