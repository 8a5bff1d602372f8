"""Scorers that share memory: a pool of graphs, one device buffer for weights that take turns, few captured bodies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reward_cases import batch_of
from tiny_scorers import QWEN, encode, hpsv3, mapanything, random_network, videoalign
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.evaluators.mapanything.evaluator import MapAnythingEvaluator
from geoalign.frozen.arena import ScorerMemory
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.vlm.body import hpsv3_head
from geoalign.rewards.vlm.scorers import _MOST_BODIES, Hpsv3Reward
from geoalign.types import RetakeBatch, SourceClip

FRAMES = 4


def conditions(count: int) -> RetakeBatch:
    batch = batch_of(count)
    camera = CameraTrajectory.build(torch.eye(4).repeat(count, FRAMES, 1, 1))
    source = SourceClip(torch.zeros(count, FRAMES, 3, 56, 84), camera, None, batch.source.clip_ids)
    return replace(batch, source=source, target_camera=camera)


def videos(count: int = 2) -> Tensor:
    return torch.rand(count, FRAMES, 3, 56, 84, generator=torch.Generator().manual_seed(1)) * 2 - 1


def size(module: nn.Module) -> int:
    """Bytes of all weights, each rounded up to 256."""
    return sum(-(-t.nbytes // 256) * 256 for t in (*module.parameters(), *module.buffers()))


def pose_reward(pose: MapAnythingEvaluator | None = None) -> GeometryReward:
    """Scores what random weights read, of which they are sure nowhere."""
    return GeometryReward(pose or mapanything(), min_tracked=0.0)


def test_scorers_that_take_turns_score_as_those_that_stay() -> None:
    batch = conditions(2)
    expected = [reward(videos(), batch).scores for reward in (hpsv3(), videoalign(), pose_reward())]
    memory = ScorerMemory(take_turns=True)
    pose = mapanything(memory=memory)
    rewards = [hpsv3(memory=memory), videoalign(memory=memory), pose_reward(pose)]
    networks = [rewards[0]._run.network, rewards[1]._run.network, pose.network]  # type: ignore[union-attr]
    assert memory.arena is None
    largest = max(map(size, networks))
    for _ in range(2):
        for reward, scores in zip(rewards, expected, strict=True):
            found = reward(videos(), batch).scores
            assert all(torch.equal(found[key], value) for key, value in scores.items())
    assert memory.arena is not None and memory.arena.device_bytes == largest
    with pytest.raises(UsageError, match="build all of them first"):
        hpsv3(memory=memory)


def test_scorers_that_stay_share_a_pool_alone() -> None:
    memory = ScorerMemory()
    first, second = hpsv3(memory=memory), videoalign(memory=memory)
    first(videos(), conditions(2))
    assert memory.arena is None
    assert first._run._memory.capture is second._run._memory.capture


def test_captions_of_all_lengths_need_few_bodies() -> None:
    """Right padding changes no score, so lengths are rounded up, also for a single caption."""

    def reward() -> Hpsv3Reward:
        return Hpsv3Reward(
            random_network(hpsv3_head), encode, "judge {text_prompt} ", "<|Reward|>", frame_stride=2,
            caption_policy="prompt",
        )  # fmt: skip

    together, batch = reward(), conditions(1)
    lengths = range(1, 400, 13)
    for length in lengths:
        captioned = replace(batch, prompts=("p" * length,))
        found = together(videos(1), captioned).scores["hps"]
        if length in (lengths[0], lengths[-1]):
            assert torch.equal(found, reward()(videos(1), captioned).scores["hps"])
    assert len(together._run._bodies) == _MOST_BODIES
    assert all(key[1] % 32 == 0 for key in together._run._bodies)


def test_a_tokenizer_of_another_model_is_refused_before_the_device_meets_it() -> None:
    reward = Hpsv3Reward(
        random_network(hpsv3_head), lambda text: [code + QWEN.rows * (code > 255) for code in encode(text)],
        "judge {text_prompt} ", "<|Reward|>", frame_stride=2,
    )  # fmt: skip
    with pytest.raises(UsageError, match=rf"token \d+, but the weights know {QWEN.rows}"):
        reward(videos(), conditions(2))
