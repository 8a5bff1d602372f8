"""Guarded rewards: exact counts and valid masks when scorers raise, hang, return NaN or lose rows."""

from __future__ import annotations

import pytest
import torch
from reward_cases import MeanReward, batch_of, honest, videos_of

from geoalign.rewards.guard import GuardedReward
from geoalign.rewards.placement import score_all


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
    guarded._hung.join(10)
    assert guarded(videos_of(2), batch_of(2)).valid.all()


def test_other_rewards_keep_their_scores_when_one_fails() -> None:
    videos, batch = videos_of(3, bad=1), batch_of(3)
    rewards = {"broken": GuardedReward(MeanReward("raise"), retries=0), "fine": GuardedReward(MeanReward())}
    out = score_all(rewards, videos, batch).outputs
    assert torch.equal(out["fine"].scores["mean"], honest(videos, batch)) and out["fine"].valid.all()
    assert out["broken"].valid.tolist() == [True, False, True]
    assert rewards["fine"].counts.invalid == 0 and rewards["broken"].counts.invalid == 1
