"""FLOPs of the reward models: closed forms against a counter on the networks themselves, at the released sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from geoalign.evaluators.mapanything.layout import LAYOUTS
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.perf.reward_cost import pose_path_flops, qwen_flops
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout


def counted(network: nn.Module, *inputs: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


# What the closed forms leave out (scale head, pooled layers, reward heads) is far below a thousandth.
@pytest.mark.parametrize("frames", [81, 21])
@pytest.mark.parametrize("release", sorted(LAYOUTS))
def test_pose_path(release: str, frames: int) -> None:
    with torch.device("meta"):
        network = PoseNetwork(LAYOUTS[release]).requires_grad_(False)
        network.position_table = torch.empty(1, 1 + 21 * 37, LAYOUTS[release].encoder_width)
        found = counted(network, torch.empty(1, frames, 3, 294, 518))
    assert pose_path_flops(release, frames) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "layout", "head", "slices", "length"),
    [("2b", VIDEOALIGN_BODY, videoalign_head, 5, 1836), ("7b", HPSV3_BODY, hpsv3_head, 1, 780)],
    ids=["videoalign", "hpsv3"],
)
def test_language_bodies(
    size: str, layout: QwenLayout, head: Callable[[QwenLayout], nn.Module], slices: int, length: int
) -> None:
    with torch.device("meta"):
        network = RewardQwen(layout, head(layout)).requires_grad_(False)
        ids, places = torch.zeros(1, length, dtype=torch.long), torch.zeros(slices * 252, dtype=torch.long)
        vision, text = (torch.empty(1008, 80),) * 2, (torch.empty(length, 128),) * 2
        found = counted(network, torch.empty(1, slices, 1008, 1176), ids, places, ids[:, :1], vision, text)
    assert qwen_flops(size, slices, 1008, length) == pytest.approx(found, rel=1e-3)
