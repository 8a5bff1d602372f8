"""Placement of rewards: equal scores everywhere, and exact counts when scorers raise, hang, return NaN or lose rows."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geoalign.errors import RewardError
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.placement import GuardedReward, WorkerReward, score_beside, score_in_turn
from geoalign.types import RetakeBatch, SourceClip

BAD = 0.75  # a video that starts with this value is the one that a faulty scorer chokes on


def batch_of(count: int) -> RetakeBatch:
    c2w = torch.eye(4).expand(count, 2, 4, 4).contiguous()
    camera = CameraTrajectory(c2w, torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(count, 2, 4).contiguous())
    video = torch.zeros(count, 2, 3, 4, 4)
    names = tuple(f"clip{i}" for i in range(count))
    return RetakeBatch(SourceClip(video, camera, None, names), camera, tuple("p" * (i + 1) for i in range(count)))


def videos_of(count: int, bad: int | None = None) -> Tensor:
    videos = torch.linspace(-0.5, 0.5, count * 96).view(count, 2, 3, 4, 4).clone()
    if bad is not None:
        videos[bad] = BAD
    return videos


class MeanReward:
    """Mean pixel plus prompt length; ``fault`` says what happens when a bad video is in the batch."""

    name, keys = "mean", ("mean",)

    def __init__(self, fault: str = "none") -> None:
        self.fault, self.calls, self.release = fault, 0, threading.Event()

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        self.calls += 1
        lengths = torch.tensor([float(len(prompt)) for prompt in batch.prompts])
        score = videos.flatten(1).mean(1) + lengths
        bad = (videos.flatten(1) == BAD).all(1)
        if self.fault == "once" and self.calls == 1:
            raise RuntimeError("first call fails")
        if bad.any():
            if self.fault == "raise":
                raise RuntimeError("cannot score this")
            if self.fault == "hang":
                self.release.wait()
            if self.fault == "nan":
                score = torch.where(bad, torch.nan, score)
            if self.fault == "partial":
                score = score[~bad]
        return RewardOutput({"mean": score}, torch.ones(len(score), dtype=torch.bool), {"pixels": score})


def honest(videos: Tensor, batch: RetakeBatch) -> Tensor:
    return MeanReward()(videos, batch).scores["mean"]


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
    out = score_in_turn(rewards, videos, batch)
    assert torch.equal(out["fine"].scores["mean"], honest(videos, batch)) and out["fine"].valid.all()
    assert out["broken"].valid.tolist() == [True, False, True]
    assert rewards["fine"].counts.invalid == 0 and rewards["broken"].counts.invalid == 1


def test_side_placement_equals_in_turn_and_decodes_ahead() -> None:
    events: list[str] = []
    decoded = threading.Event()

    class Waiting(MeanReward):
        def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
            if self.calls == 0:
                assert decoded.wait(10), "batch 1 must be decoded while batch 0 is scored"
            events.append(f"score{self.calls}")
            return super().__call__(videos, batch)

    def decode(index: int) -> Tensor:
        events.append(f"decode{index}")
        if index == 1:
            decoded.set()
        return videos_of(2) + index

    batches = [batch_of(2)] * 3
    outputs = list(score_beside(decode, batches, {"mean": Waiting()}))
    for index, output in enumerate(outputs):
        assert torch.equal(output["mean"].scores["mean"], honest(videos_of(2) + index, batches[index]))
    assert len(outputs) == 3 and events.index("decode1") < events.index("score0")


@pytest.fixture(scope="module")
def worker_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "stand_in_scorer.py").write_text(
        "import os, time, torch\n"
        "from geoalign.rewards.base import RewardOutput\n"
        "class Scorer:\n"
        "    name, keys = 'mean', ('mean',)\n"
        "    def __init__(self, offset): self.offset = offset\n"
        "    def __call__(self, videos, batch):\n"
        "        print('scorers may print')\n"
        "        first = videos.flatten(1)[:, 0]\n"
        "        if (first == 0.75).any(): time.sleep(600)\n"
        "        if (first == 0.875).any(): os._exit(3)\n"
        "        if (first == 0.625).any(): raise ValueError('bad pixels')\n"
        "        lengths = torch.tensor([float(len(p)) for p in batch.prompts])\n"
        "        score = videos.flatten(1).mean(1) + lengths + self.offset\n"
        "        flag = torch.full((len(score),), float(os.environ.get('ONLY_THERE', 'nan')))\n"
        "        return RewardOutput({'mean': score}, torch.ones(len(score), dtype=torch.bool), {'env': flag})\n"
    )
    return folder


def test_worker_scores_equally_in_its_own_environment_and_survives_failures(worker_module: Path) -> None:
    worker = WorkerReward(
        "mean",
        ("mean",),
        "stand_in_scorer:Scorer",
        options={"offset": 0.0},
        environment={"ONLY_THERE": "7", "PYTHONPATH": f"{worker_module}:{Path(__file__).parents[2]}"},
        timeout_s=120.0,
    )
    try:
        videos, batch = videos_of(3), batch_of(3)
        out = worker(videos, batch)
        assert torch.equal(out.scores["mean"], honest(videos, batch)) and out.parts["env"].tolist() == [7.0] * 3
        with pytest.raises(RewardError, match="ValueError: bad pixels"):
            worker(torch.full_like(videos, 0.625), batch)
        assert worker.starts == 1  # an exception does not cost the process
        worker.timeout_s = 0.5
        guarded = GuardedReward(worker, retries=1)
        assert not guarded(torch.full_like(videos, BAD), batch).valid.any()
        assert (guarded.counts.timeouts, guarded.counts.invalid) == (1, 3)
        worker.timeout_s = 120.0
        assert torch.equal(guarded(videos, batch).scores["mean"], honest(videos, batch))
        assert worker.starts == 2
        with pytest.raises(RewardError, match="ended without an answer"):
            worker(torch.full_like(videos, 0.875), batch)
    finally:
        worker.close()
    assert not Path(worker._folder.name).exists()
