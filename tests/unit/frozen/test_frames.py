"""One preprocessing pass for all scorers of a batch: how often it runs, what it skips, how long its results live, and
that C++ and torch, shared and alone, inline and in a worker give the same scores."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT, SUPPORT
from reward_cases import score_videos
from torch import Tensor

import geoalign_kernels as gk
from geoalign.config.rewards import FailureConfig, RewardConfig
from geoalign.errors import ConfigError
from geoalign.frozen.frames import SharedFrames
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards import registry
from geoalign.rewards.registry import build_rewards
from geoalign.rewards.running.worker import WorkerReward
from geoalign.rewards.vlm.scorers import VideoAlignReward
from geoalign.rl.score import Scores
from geoalign.types import RetakeBatch, SourceClip

BATCH, FRAMES, SIZE = 2, 6, (480, 832)
ALL = {
    "geometry": RewardConfig(kind="geometry", options={"evaluator": "mapanything"}),
    "videoalign": RewardConfig(kind="videoalign"),
    "hpsv3": RewardConfig(kind="hpsv3"),
}
ONE_LEVEL = 1 / 255 / 0.224
"""After the smallest standard deviation of both statistics."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    for name in ("videoalign", "hpsv3"):
        monkeypatch.setitem(registry.REWARDS, name, f"tiny_scorers:{name}")
    monkeypatch.setitem(registry.EVALUATORS, "mapanything", "tiny_scorers:mapanything")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[gk.FramePlan, list[weakref.ref[Tensor]]]]:
    """The plan of every pass that runs, and weak references to what it made."""
    seen: list[tuple[gk.FramePlan, list[weakref.ref[Tensor]]]] = []
    run = gk.frame_preprocess

    def watched(video: Tensor, plan: gk.FramePlan) -> gk.FrameInputs:
        inputs = run(video, plan)
        seen.append((plan, [weakref.ref(part) for part in inputs if part.numel()]))
        return inputs

    monkeypatch.setattr(gk, "frame_preprocess", watched)
    return seen


def alive(made: Sequence[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in made)


def videos_of(size: tuple[int, int] = SIZE, frames: int = FRAMES) -> Tensor:
    """Drifting waves of another frequency per video, with a little noise."""
    y, x = (torch.linspace(0, 1, side) for side in size)
    time = torch.arange(frames).view(-1, 1, 1, 1) / 20
    channel = torch.arange(3.0).view(3, 1, 1)
    clips = [torch.sin((9 + 5 * b) * (x + time) + channel) * torch.cos(7 * y[:, None] - time) for b in range(BATCH)]
    noise = torch.randn(BATCH, frames, 3, *size, generator=torch.Generator().manual_seed(0))
    return (0.8 * torch.stack(clips) + 0.05 * noise).clamp(-1, 1)


def batch_of() -> RetakeBatch:
    c2w = torch.eye(4).expand(BATCH, FRAMES, 4, 4).contiguous()
    camera = CameraTrajectory(c2w, torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(BATCH, FRAMES, 4).contiguous())
    source = SourceClip(torch.zeros(BATCH, FRAMES, 3, 4, 4), camera, None, ("a", "b"))
    return RetakeBatch(source, camera, ("one", "two"))


def same_scores(found: Scores, expected: Scores, tolerance: float) -> None:
    assert found.valid.all() and expected.valid.all()
    for key, score in expected.scores.items():
        torch.testing.assert_close(found.scores[key], score, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("failures", [None, FailureConfig(timeout_s=PATIENCE_S)])
def test_a_batch_scored_by_three_rewards_is_preprocessed_once(passes, failures: FailureConfig | None) -> None:
    rewards, videos, batch = build_rewards(ALL, failures), videos_of(), batch_of()
    for count in (1, 2):  # another tensor is another batch, whatever it holds
        assert score_videos(rewards, videos.clone(), batch).valid.all()
        assert len(passes) == count
    # All frames for the camera, 4 of 6 for VideoAlign (2 a second, at least 4), every second one for HPSv3.
    assert [plan.counts for plan, _ in passes] == [(6, 4, 3)] * 2


def test_videoalign_is_told_the_videos_own_frame_rate(passes) -> None:
    """Two frames a second, at least 4: 6 frames are 3 s at 2 a second and under half a second at 16, the default."""
    rewards, videos, batch = (
        build_rewards({name: ALL[name] for name in ("videoalign", "hpsv3")}),
        videos_of(),
        batch_of(),
    )
    for fps in (None, 2.0, 16.0, 2.0):
        told = replace(batch, fps=fps)
        assert told.select([0, 1]).to("cpu").repeat_interleave(1).fps == fps
        assert score_videos(rewards, videos.clone(), told).valid.all()
    assert [plan.counts[1] for plan, _ in passes] == [4, 6, 4, 6]
    # Whoever asks first prepares what VideoAlign saw of the batch before; then it has a pass of its own.
    score_videos(dict(reversed(rewards.items())), videos.clone(), replace(batch, fps=16.0))
    assert [plan.counts[1] for plan, _ in passes[4:]] == [6, 4]
    reward = rewards["videoalign"]
    assert isinstance(reward, VideoAlignReward)
    reward.clip_fps = 16.0  # what a configuration says wins
    score_videos(rewards, videos.clone(), replace(batch, fps=2.0))
    assert passes[-1][0].counts[1] == 4


@pytest.mark.parametrize(
    ("size", "expected"), [(SIZE, [(6, 4, 3)]), ((240, 416), [(6, 4, 0), (0, 0, 3)])], ids=["one pass", "two sizes"]
)
def test_scores_do_not_depend_on_what_else_is_scored(passes, size: tuple[int, int], expected: list) -> None:
    """240 x 416 pixels are nearly enough for VideoAlign and far too few for HPSv3, so their patches differ in size."""
    videos, batch = videos_of(size), batch_of()
    together = score_videos(build_rewards(ALL), videos, batch)
    alone = [score_videos(build_rewards({name: config}), videos, batch) for name, config in ALL.items()]
    assert [plan.counts for plan, _ in passes] == [*expected, (6, 0, 0), (0, 4, 0), (0, 0, 3)]
    for one in alone:
        for key, score in one.scores.items():
            assert torch.equal(together.scores[key], score)


def test_native_and_torch_inputs_are_equal_but_for_rounding_ties() -> None:
    made = []
    for backend in ("cpp", "reference"):
        frames = SharedFrames()
        views = (
            frames.geometry(lambda count: (0, count - 1, 2)),
            frames.clip(lambda count: (3, 1), lambda height, width: (336, 588)),
            frames.still(lambda count: (count - 2,), lambda height, width: (336, 588)),
        )
        videos = videos_of()
        with gk.use_backend(backend, "frame_preprocess"):
            made.append([view(videos) for view in views])
    for native, plain in zip(*made, strict=True):
        assert (native.frames, native.size) == (plain.frames, plain.size)
        gap = (native.inputs - plain.inputs).abs()
        # The bounds of the op's own test: one level, and only where a sum lies on a tie.
        assert gap.max() < 1.5 * ONE_LEVEL
        assert (gap > 1e-5).float().mean() < 3e-5
    assert [shown.inputs.shape[1] for shown in made[0]] == [3, 1, 1]


def test_native_and_torch_give_the_same_scores() -> None:
    """At most three values in 100,000 move, by 1/60 of a standard deviation: 5e-7 of a mean over pixels. Ten times that
    and a few float32 roundings leave 2e-5; another video moves every score by ten times as much."""
    scored = {}
    for backend in ("cpp", "reference"):
        with gk.use_backend(backend, "frame_preprocess"):
            scored[backend] = score_videos(build_rewards(ALL), videos_of(), batch_of())
    same_scores(scored["cpp"], scored["reference"], tolerance=2e-5)
    for key, score in scored["cpp"].scores.items():
        assert (score[0] - score[1]).abs() > 2e-4, key


def test_frames_that_nobody_reads_do_not_matter() -> None:
    videos, batch = videos_of(), batch_of()
    rewards = build_rewards({name: ALL[name] for name in ("videoalign", "hpsv3")})
    clean = score_videos(rewards, videos, batch)
    broken = videos.clone()
    broken[:, 1] = torch.nan  # VideoAlign reads 0, 2, 3, 5 and HPSv3 0, 2, 4
    same_scores(score_videos(rewards, broken, batch), clean, tolerance=0.0)
    broken[0, 3, 2, 5, 7] = torch.inf  # VideoAlign reads it, in the first video alone
    assert rewards["videoalign"](broken, batch).valid.tolist() == [False, True]
    assert rewards["hpsv3"](broken, batch).valid.tolist() == [True, True]


def test_inputs_go_when_they_are_taken_and_when_the_videos_go(passes) -> None:
    rewards, videos, batch = build_rewards(ALL), videos_of(), batch_of()
    rewards["videoalign"](videos, batch)
    assert alive(passes[0][1]) == 2  # those of the others wait
    rewards["hpsv3"](videos, batch)
    assert alive(passes[0][1]) == 1
    watched = weakref.ref(videos)
    del videos
    assert alive(passes[0][1]) == 0 and watched() is None
    # A scored batch leaves nothing behind either: what rewards remember of it does not keep it alive.
    videos, batch = videos_of(), batch_of()
    watched, source = weakref.ref(videos), weakref.ref(batch.source.video)
    score_videos(rewards, videos, batch)
    assert alive(passes[1][1]) == 0
    del videos, batch
    gc.collect()
    assert watched() is None and source() is None


def test_a_scorer_that_is_tried_again_sees_the_same(passes) -> None:
    reward, videos, batch = build_rewards({"hpsv3": ALL["hpsv3"]})["hpsv3"], videos_of(), batch_of()
    first, again = reward(videos, batch), reward(videos, batch)
    assert torch.equal(first.scores["hps"], again.scores["hps"])
    assert len(passes) == 2


def test_the_grey_video_of_the_motion_score_is_a_pass_of_its_own(passes) -> None:
    videos, batch = videos_of(), batch_of()
    grey = build_rewards({"x": RewardConfig(kind="videoalign", options={"greyscale_motion": True})})["x"]
    plain = build_rewards({"x": ALL["videoalign"]})["x"]
    found, expected = grey(videos, batch), plain(videos, batch)
    assert [plan.slots.shape[1] for plan, _ in passes] == [FRAMES, 4, FRAMES]
    assert torch.equal(found.scores["vis"], expected.scores["vis"])
    assert (found.scores["mot"] - expected.scores["mot"]).abs().min() > 1e-3


def test_a_worker_process_gives_the_same_scores_as_the_shared_pass() -> None:
    videos, batch = videos_of(), batch_of()
    inline = score_videos(build_rewards(ALL), videos, batch)
    folder, root = SUPPORT, ROOT
    worker = WorkerReward(
        "hpsv3", (), "tiny_scorers:hpsv3",
        environment={"PYTHONPATH": f"{folder}:{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}, timeout_s=PATIENCE_S,
    )  # fmt: skip
    try:
        found = worker(videos, batch)
    finally:
        worker.close()
    assert torch.equal(found.scores["hps"], inline.scores["hps"])


@pytest.mark.parametrize("option", ["frames", "shared"])
def test_what_the_registry_provides_is_no_option(option: str) -> None:
    options: list[dict[str, Any]] = [
        {"evaluator": "mapanything", "evaluator_options": {option: 1}},
        {"evaluator": "mapanything", option: 1},
    ]
    for one in options:
        with pytest.raises(ConfigError, match=f"unknown option '{option}'"):
            build_rewards({"x": RewardConfig(kind="geometry", options=one)})
    with pytest.raises(ConfigError, match=f"unknown option '{option}'"):
        build_rewards({"x": RewardConfig(kind="hpsv3", options={option: 1})})
