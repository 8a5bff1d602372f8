"""Small random scorers of the real classes, by factories that a test's process and a worker can both import."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from geoalign.evaluators.mapanything.evaluator import MapAnythingEvaluator
from geoalign.evaluators.mapanything.layout import PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.frozen.arena import ScorerMemory
from geoalign.frozen.frames import SharedFrames
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import QwenLayout
from geoalign.rewards.vlm.scorers import Hpsv3Reward, VideoAlignReward

QWEN = QwenLayout(32, 1, 2, 64, 64, 1, 4, 2, 128, rows=512)
POSE = PoseNetworkLayout(48, 1, 2, "swiglu", False, 48, 2, 2, "swiglu", True, True)
SPECIAL = re.compile(r"(<\|\w+\|>)")
STRIDE = 2


def encode(text: str) -> list[int]:
    """A byte per letter, one number per special token."""
    parts = SPECIAL.split(text)
    return [
        code for part in parts for code in ([256 + sum(part.encode()) % 256] if SPECIAL.match(part) else part.encode())
    ]


def random_network(head: Callable[[QwenLayout], nn.Module]) -> RewardQwen:
    torch.manual_seed(0)
    network = RewardQwen(QWEN, head(QWEN)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def videoalign(
    frames: SharedFrames | None = None, greyscale_motion: bool = False, memory: ScorerMemory | None = None
) -> VideoAlignReward:
    text = "look <|VQ_reward|> move <|MQ_reward|>"
    network = random_network(videoalign_head)
    return VideoAlignReward(network, encode, text, greyscale_motion=greyscale_motion, frames=frames, memory=memory)


def hpsv3(frames: SharedFrames | None = None, memory: ScorerMemory | None = None) -> Hpsv3Reward:
    network = random_network(hpsv3_head)
    return Hpsv3Reward(
        network, encode, "judge {text_prompt} ", "<|Reward|>", frame_stride=STRIDE, frames=frames, memory=memory
    )


def mapanything(frames: SharedFrames | None = None, memory: ScorerMemory | None = None) -> MapAnythingEvaluator:
    torch.manual_seed(0)
    return MapAnythingEvaluator(PoseNetwork(POSE).eval().requires_grad_(False), frames=frames, memory=memory)
