"""When rewards run changes nothing of what they say: in chunks, beside decoding, elsewhere at the same time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from patience import PATIENCE_S
from reward_cases import MeanReward, batch_of, honest, videos_of
from torch import Tensor

from geoalign.config.rewards import FailureConfig, RewardConfig
from geoalign.config.world import WorldConfig
from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEstimate
from geoalign.frozen.precision import HOST, exact_float32
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.registry import LastResult, build_rewards
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.turns import Scored, decode_and_score, score_all
from geoalign.types import RetakeBatch, SourceClip
from geoalign.world.pairs import PairedVideos, paired_videos

PLACEMENTS = [(chunk, beside) for chunk in (None, 1, 4, 5) for beside in (False, True)]
OUTPUTS = ("scores", "parts", "diagnostics")


def same(a: Scored, b: Scored) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if list(a.outputs) != list(b.outputs):
        return False
    for x, y in zip(a.outputs.values(), b.outputs.values(), strict=True):
        tables = [(getattr(x, group), getattr(y, group)) for group in OUTPUTS] + [({"v": x.valid}, {"v": y.valid})]
        for mine, theirs in tables:
            if mine.keys() != theirs.keys():
                return False
            if not all(torch.equal(torch.nan_to_num(mine[k] + 0.0), torch.nan_to_num(theirs[k] + 0.0)) for k in mine):
                return False
    return True


@pytest.fixture(scope="module")
def pairs() -> PairedVideos:
    return paired_videos(WorldConfig(), 5, torch.Generator().manual_seed(5), style="real")


@pytest.mark.parametrize("chunk", [None, 1, 4, 5])
def test_chunks_and_overlap_change_no_score(pairs: PairedVideos, chunk: int | None) -> None:
    """Ten videos, two of each condition, by the product's own rewards, which share one estimate per chunk."""
    geometry = RewardConfig(kind="geometry", options={"evaluator": "planar"})
    configs = {"geometry": geometry, "consistency": geometry.model_copy(update={"kind": "source_consistency"})}
    members = pairs.batch.repeat_interleave(2)
    videos = pairs.truth.repeat_interleave(2, dim=0)
    videos[1::2] = videos[1::2].flip(1)
    estimated: list[int] = []

    def decode(rows: Tensor, part: RetakeBatch) -> Tensor:
        assert part.source.clip_ids == tuple(members.source.clip_ids[i] for i in rows.tolist())
        return videos[rows]

    def run(beside: bool) -> Scored:
        rewards = build_rewards(configs, FailureConfig())
        shared = rewards["geometry"].reward.evaluator
        inner = shared.evaluator
        shared.evaluator = lambda video, source: estimated.append(len(video)) or inner(video, source)
        return decode_and_score(
            rewards, decode, pairs.batch, torch.arange(2 * len(pairs.batch)) // 2, chunk=chunk, beside=beside
        )

    found, overlapped = run(False), run(True)
    assert same(overlapped, found)
    assert estimated == 2 * [len(rows) for rows in torch.arange(10).split(chunk or 10)]
    expected = score_all(build_rewards(configs, FailureConfig()), videos, members)
    if chunk is None:
        assert same(found, expected)
    for name, output in expected.outputs.items():
        for group in OUTPUTS:
            # Another batch shape may sum in another order: some roundings of metres, radians (1) and degrees (45).
            torch.testing.assert_close(
                getattr(found.outputs[name], group), getattr(output, group), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(("chunk", "beside"), PLACEMENTS)
@pytest.mark.parametrize("fault", ["raise", "nan", "partial"])
def test_failures_are_those_of_scoring_everything_at_once(fault: str, chunk: int | None, beside: bool) -> None:
    videos, batch = videos_of(9, bad=6), batch_of(9)

    def guarded() -> dict[str, GuardedReward]:
        return {"bad": GuardedReward(MeanReward(fault), retries=1), "fine": GuardedReward(MeanReward())}

    expected = score_all(guarded(), videos, batch)
    rewards = guarded()
    found = decode_and_score(rewards, lambda rows, _: videos[rows], batch, chunk=chunk, beside=beside)
    assert same(found, expected)
    assert [reward.counts.invalid for reward in rewards.values()] == [1, 0]
    assert found.outputs["bad"].valid.tolist() == [row != 6 for row in range(9)]


def test_the_next_chunk_is_decoded_while_one_is_scored() -> None:
    """Chunk 0 cannot be scored before chunk 1 is decoded, which only an overlap achieves; then order by order."""
    events: list[str] = []
    decoded = threading.Event()

    class Waiting(MeanReward):
        def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
            if self.calls == 0:
                assert decoded.wait(PATIENCE_S), "chunk 1 must be decoded while chunk 0 is scored"
            events.append(f"score{self.calls}")
            return super().__call__(videos, batch)

    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        index = int(rows[0]) // 2
        events.append(f"decode{index}")
        if index == 1:
            decoded.set()
        return videos_of(6)[rows]

    found = decode_and_score({"mean": Waiting()}, decode, batch_of(6), chunk=2, beside=True)
    assert torch.equal(found.outputs["mean"].scores["mean"], honest(videos_of(6), batch_of(6)))
    assert events.index("decode1") < events.index("score0")
    assert events.index("score0") < events.index("decode2")  # never two chunks ahead
    assert [e for e in events if e[0] == "d"] == ["decode0", "decode1", "decode2"]


@pytest.mark.parametrize(("beside", "others"), [(False, 0), (True, 1)])
def test_decoded_chunks_do_not_pile_up(beside: bool, others: int) -> None:
    """When a chunk is decoded, at most one other (the one being scored) is alive, shared evaluator included."""
    alive: list[weakref.ref[Tensor]] = []

    class Still:
        name = "still"

        def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
            count = len(video)
            poses = torch.eye(4).expand(count, 2, 4, 4)
            return PoseEstimate(poses, torch.arange(2), torch.ones(count), torch.zeros(count))

    shared = LastResult(Still())

    class Posed(MeanReward):
        def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
            shared(videos, batch.source)
            return super().__call__(videos, batch)

    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        assert sum(ref() is not None for ref in alive) <= others
        video = videos_of(12)[rows]
        alive.append(weakref.ref(video))
        return video

    rewards = {"guarded": GuardedReward(Posed("raise"), timeout_s=PATIENCE_S), "plain": Posed()}
    decode_and_score(rewards, decode, batch_of(12), chunk=2, beside=beside)
    assert len(alive) == 6 and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("beside", [False, True])
def test_seconds_are_those_of_each_scorer(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock per thread that only work moves: what decoding takes is charged to nobody, chunks add up."""
    clock = threading.local()

    def work(seconds: float) -> None:
        clock.now = getattr(clock, "now", 0.0) + seconds

    class Busy(MeanReward):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
            work(self.seconds * len(videos))
            return super().__call__(videos, batch)

    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        work(1000.0)
        return videos_of(8)[rows]

    monkeypatch.setattr(time, "perf_counter", lambda: getattr(clock, "now", 0.0))
    found = decode_and_score({"a": Busy(1.0), "b": Busy(5.0)}, decode, batch_of(8), chunk=3, beside=beside)
    assert found.seconds == {"a": 8.0, "b": 40.0}


class Meeting(MeanReward):
    """Answers once all parties have begun: rewards that run one after another never meet."""

    def __init__(self, barrier: threading.Barrier, elsewhere: bool) -> None:
        super().__init__()
        self.barrier, self.elsewhere = barrier, elsewhere

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        self.barrier.wait(PATIENCE_S)
        return super().__call__(videos, batch)


@pytest.mark.parametrize("beside", [False, True])
def test_rewards_elsewhere_run_while_the_others_do(beside: bool) -> None:
    barrier = threading.Barrier(3)
    rewards = {
        "here": Meeting(barrier, False),
        "there": GuardedReward(Meeting(barrier, True)),
        "yonder": GuardedReward(Meeting(barrier, True), timeout_s=PATIENCE_S),
    }
    found = decode_and_score(rewards, lambda rows, _: videos_of(4)[rows], batch_of(4), chunk=2, beside=beside)
    assert list(found.outputs) == list(rewards)  # in the order of the configuration, whoever ends first
    for output in found.outputs.values():
        assert output.valid.all() and torch.equal(output.scores["mean"], honest(videos_of(4), batch_of(4)))


class Failing(MeanReward):
    def __init__(self, error: Exception, elsewhere: bool = False) -> None:
        super().__init__()
        self.error, self.elsewhere = error, elsewhere

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        raise self.error


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_wrong_set_up_is_raised_and_failures_stay_at_home(elsewhere: bool, beside: bool) -> None:
    def run(error: Exception) -> Scored:
        rewards = {"bad": Failing(error, elsewhere), "fine": MeanReward()}
        return decode_and_score(rewards, lambda rows, _: videos_of(4)[rows], batch_of(4), chunk=2, beside=beside)

    with pytest.raises(UsageError, match="wrong set-up"):
        run(UsageError("wrong set-up"))
    found = run(RuntimeError("broken"))
    assert not found.outputs["bad"].valid.any() and found.outputs["fine"].valid.all()


def test_a_failing_decode_is_raised_and_leaves_no_thread() -> None:
    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        if rows[0] == 2:
            raise RuntimeError("cannot decode")
        return videos_of(4)[rows]

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="cannot decode"):
        decode_and_score({"mean": MeanReward()}, decode, batch_of(4), torch.arange(4), chunk=2, beside=True)
    assert threading.active_count() == before
    for count, chunk in ((4, 0), (0, 2)):
        with pytest.raises(UsageError, match="nothing to score"):
            decode_and_score({}, decode, batch_of(4), torch.arange(count), chunk=chunk)


def test_a_shared_estimate_belongs_to_its_video() -> None:
    """Two threads with two videos, as when a scorer was given up as late: one runs at a time, nothing is mixed up."""
    inside, most = 0, 0
    second_calls = threading.Event()

    class Counting:
        name = "counting"

        def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            second_calls.wait(PATIENCE_S)
            time.sleep(0.05)  # room for the other thread to come in, which it must not
            mark = video.flatten(1)[:, 0]
            inside -= 1
            return PoseEstimate(torch.eye(4).expand(1, 2, 4, 4), torch.arange(2), mark, mark)

    shared, source = LastResult(Counting()), batch_of(1).source
    answers: dict[float, float] = {}

    def ask(value: float, before: Callable[[], None] = lambda: None) -> None:
        video = torch.full((1, 2, 3, 4, 4), value)
        before()
        answers[value] = float(shared(video, source).tracked)

    threads = [threading.Thread(target=ask, args=(0.25,)), threading.Thread(target=ask, args=(0.5, second_calls.set))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == {0.25: 0.25, 0.5: 0.5} and most == 1


def test_no_scorer_changes_the_precision_under_a_decode() -> None:
    """TF32 switches belong to the process: a thread that sets them waits for a decode, and a decode waits for it."""
    free: list[bool] = []

    def probe() -> None:
        got = HOST.acquire(blocking=False)
        free.append(got)
        if got:
            HOST.release()

    def elsewhere() -> None:
        thread = threading.Thread(target=probe)
        thread.start()
        thread.join(PATIENCE_S)

    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        elsewhere()
        return videos_of(4)[rows]

    decode_and_score({"mean": MeanReward()}, decode, batch_of(4), chunk=2, beside=True)
    with exact_float32():
        elsewhere()
    elsewhere()
    assert free == [False, False, False, True]
