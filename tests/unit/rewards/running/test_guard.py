"""Guarded rewards: exact counts and valid masks when scorers raise, hang, return NaN or lose rows."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from patience import PATIENCE_S
from reward_cases import MeanReward, batch_of, honest, videos_of

from geoalign.errors import RunError
from geoalign.frozen import precision
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.turns import decode_and_score, score_all
from geoalign.rl.score import merged
from geoalign.types import RetakeBatch


@pytest.mark.parametrize("fault", ["raise", "nan", "partial"])
def test_one_bad_sample_leaves_the_others_alone(fault: str) -> None:
    videos, batch = videos_of(4, bad=2), batch_of(4)
    guarded = GuardedReward(MeanReward(fault), retries=1)
    out = guarded(videos, batch)
    good = torch.tensor([True, True, False, True])
    assert torch.equal(out.valid, good)
    assert torch.equal(out.scores["mean"][good], honest(videos, batch)[good])
    assert guarded.counts.invalid == 1 and guarded.counts.calls == 1
    if fault == "nan":  # the scorer answered: nothing to repeat
        assert guarded.counts.retries == 0 and not guarded.counts.errors
    else:  # two whole batches and the one bad sample alone
        name = "RuntimeError" if fault == "raise" else "RewardError"
        assert guarded.counts.retries == 1 and guarded.counts.errors == {name: 3}


def test_a_passing_fault_is_repaired_by_the_retry() -> None:
    guarded = GuardedReward(MeanReward("once"), retries=1)
    out = guarded(videos_of(3), batch_of(3))
    assert out.valid.all() and torch.equal(out.scores["mean"], honest(videos_of(3), batch_of(3)))
    assert (guarded.counts.retries, guarded.counts.invalid, guarded.counts.errors["RuntimeError"]) == (1, 0, 1)


def test_a_hung_scorer_times_out_once_and_recovers() -> None:
    reward = MeanReward("hang")
    guarded = GuardedReward(reward, timeout_s=0.2, retries=3)
    assert not guarded(videos_of(2, bad=0), batch_of(2)).valid.any()
    assert not guarded(videos_of(2), batch_of(2)).valid.any()  # still busy: invalid at once, not queued
    assert (guarded.counts.timeouts, guarded.counts.retries, guarded.counts.invalid) == (2, 0, 4)
    assert reward.calls == 1
    reward.release.set()
    guarded._hung.join(PATIENCE_S)
    guarded.timeout_s = PATIENCE_S  # what follows is not about time
    assert guarded(videos_of(2), batch_of(2)).valid.all()


def test_the_first_batch_of_a_shape_may_take_longer() -> None:
    """A call of 1 s against a limit of 0.9 s: in time while its shape is new (ten times that), late afterwards."""

    class Slow(MeanReward):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            time.sleep(1.0)
            return super().__call__(videos, batch)

    guarded = GuardedReward(Slow(), timeout_s=0.9)
    assert guarded(videos_of(2), batch_of(2)).valid.all()
    assert not guarded(videos_of(2), batch_of(2)).valid.any()


def test_parts_of_another_shape_are_a_failure_of_their_scorer() -> None:
    class Total(MeanReward):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            out = super().__call__(videos, batch)
            return RewardOutput(out.scores, out.valid, {"total": out.scores["mean"].sum()})

    videos, batch = videos_of(3), batch_of(3)
    guarded = GuardedReward(Total(), retries=0)
    assert not guarded(videos, batch).valid.any() and guarded.counts.errors == {"RewardError": 4}
    assert not score_all({"bare": Total()}, videos, batch).outputs["bare"].valid.any()


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 4, 4), (3, 4, 3, 4)])
def test_cameras_of_another_shape_are_a_failure_of_their_scorer(shape: tuple[int, ...]) -> None:
    class Reads(MeanReward):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            return replace(super().__call__(videos, batch), cameras=torch.zeros(shape))

    guarded = GuardedReward(Reads(), retries=0)
    assert not guarded(videos_of(3), batch_of(3)).valid.any() and guarded.counts.errors["RewardError"]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_cameras_stay_with_their_videos_and_are_unknown_where_a_scorer_failed(chunk: int) -> None:
    class Reads(MeanReward):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            means = videos.mean((2, 3, 4))[..., None, None]  # [B, F, 1, 1]
            return replace(super().__call__(videos, batch), cameras=means.expand(-1, -1, 4, 4))

    videos, rewards = videos_of(3, bad=1), {"blind": Other(), "reads": GuardedReward(Reads("raise"), retries=0)}
    scored = decode_and_score(rewards, lambda rows, part: videos[rows], batch_of(3), chunk=chunk)
    for row, known in enumerate((True, False, True)):
        camera = scored.camera(row)
        assert torch.equal(camera[:, 0, 0], videos[row].mean((1, 2, 3))) if known else torch.isnan(camera).all()
    assert decode_and_score({"blind": Other()}, lambda rows, part: videos[rows], batch_of(3)).camera(0) is None


def test_a_bare_reward_that_loses_rows_is_invalid() -> None:
    out = score_all({"bare": MeanReward("partial")}, videos_of(3, bad=1), batch_of(3)).outputs["bare"]
    assert out.valid.tolist() == [False] * 3


def test_each_scorer_counts_the_samples_that_it_failed_on() -> None:
    """Two scorers may fail on the same sample, which is lost once."""
    videos, batch = videos_of(3, bad=1), batch_of(3)
    rewards = {"a": GuardedReward(MeanReward("raise")), "b": GuardedReward(Other("nan"))}
    scores = merged(score_all(rewards, videos, batch), torch.tensor([False, True, True]))
    assert scores.failures == {"policy": 1, "a": 1, "b": 1}
    assert scores.valid.tolist() == [False, False, True]


def test_a_lost_sample_stays_valid_and_a_failed_one_is_not_lost() -> None:
    """One reward can read nothing in samples 0 and 1; another one fails on sample 1."""

    class Blind(MeanReward):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            out = super().__call__(videos, batch)
            lost = torch.tensor([True, True, False])[: len(videos)]
            return RewardOutput({"mean": out.scores["mean"].masked_fill(lost, math.nan)}, out.valid, lost=lost)

    videos, batch = videos_of(3, bad=1), batch_of(3)
    guarded = GuardedReward(Blind())
    answers = decode_and_score({"a": guarded, "b": Other("nan")}, lambda rows, part: videos[rows], batch, chunk=3)
    scores = merged(answers)
    assert scores.valid.tolist() == [True, False, True] and scores.lost.tolist() == [True, False, False]
    assert scores.failures == {"policy": 0, "a": 0, "b": 1} and guarded.counts.invalid == 0
    assert scores.scores["mean"][:2].tolist() == [0.0, 0.0] and scores.scores["mean"][2] != 0


class Other(MeanReward):
    keys = ("other",)

    def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
        out = super().__call__(videos, batch)
        return RewardOutput({"other": out.scores["mean"]}, out.valid)


def test_the_trainer_does_not_wait_forever_for_a_scorer_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "PATIENCE_S", 0.05)
    held, release = threading.Event(), threading.Event()

    def hang() -> None:
        with precision.exact_float32():
            held.set()
            release.wait(PATIENCE_S)

    thread = threading.Thread(target=hang)
    thread.start()
    held.wait(PATIENCE_S)
    try:
        with pytest.raises(RunError, match="placement=worker"):
            decode_and_score({"mean": MeanReward()}, lambda rows, _: videos_of(len(rows)), batch_of(2))
    finally:
        release.set()
        thread.join()


def test_other_rewards_keep_their_scores_when_one_fails() -> None:
    videos, batch = videos_of(3, bad=1), batch_of(3)
    rewards = {"broken": GuardedReward(MeanReward("raise"), retries=0), "fine": GuardedReward(MeanReward())}
    out = score_all(rewards, videos, batch).outputs
    assert torch.equal(out["fine"].scores["mean"], honest(videos, batch)) and out["fine"].valid.all()
    assert out["broken"].valid.tolist() == [True, False, True]
    assert rewards["fine"].counts.invalid == 0 and rewards["broken"].counts.invalid == 1
