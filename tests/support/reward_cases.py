"""Small conditions, stand-in rewards, small captured bodies and a spy on host reads, shared by the tests of rewards."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from geoalign.evaluators.mapanything.evaluator import MapAnythingEvaluator, PoseBody
from geoalign.evaluators.mapanything.layout import PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.running.turns import score_all
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import QwenLayout
from geoalign.rewards.vlm.scorers import Hpsv3Reward, StaticBody
from geoalign.rl.score import Scores, merged
from geoalign.types import RetakeBatch, SourceClip

BAD = 0.75  # a video that starts with this value is the one that a faulty scorer chokes on


def batch_of(count: int) -> RetakeBatch:
    """Conditions without content; prompt i has i + 1 letters."""
    c2w = torch.eye(4).expand(count, 2, 4, 4).contiguous()
    camera = CameraTrajectory(c2w, torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(count, 2, 4).contiguous())
    video = torch.zeros(count, 2, 3, 4, 4)
    names = tuple(f"clip{i}" for i in range(count))
    return RetakeBatch(SourceClip(video, camera, None, names), camera, tuple("p" * (i + 1) for i in range(count)))


def score_videos(rewards: Mapping[str, Reward], videos: Tensor, batch: RetakeBatch) -> Scores:
    """The answers of all rewards as the trainer sees them."""
    return merged(score_all(rewards, videos, batch))


def videos_of(count: int, bad: int | None = None) -> Tensor:
    """Videos ``[count, 2, 3, 4, 4]``, all different; one may be bad."""
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
    """What MeanReward says when nothing is wrong."""
    return MeanReward()(videos, batch).scores["mean"]


class HostReads(TorchDispatchMode):
    """Counts operators whose shape or value needs the device to finish, which no graph capture survives."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func._schema.name.split("::")[1]
        boolean_index = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for argument in args
            if isinstance(argument, (list, tuple))
            for i in argument
        )
        if boolean_index or any(name.startswith(bad) for bad in self.FORBIDDEN):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


# The arrangement of release 1.1 (gated feed-forward, layer scale, class token) and of release 1 (norm, projection).
POSE_1_1 = PoseNetworkLayout(48, 1, 2, "swiglu", False, 48, 2, 2, "swiglu", True, True)
POSE_1 = PoseNetworkLayout(48, 2, 2, "gelu", True, 32, 2, 2, "gelu", False, False)
QWEN = QwenLayout(32, 2, 2, 64, 64, 2, 4, 2, 128, rows=512)
Body = tuple[nn.Module, tuple[Tensor, ...]]


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Frozen, in eval mode, with weights that keep activations near size one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


def pose_body(layout: PoseNetworkLayout, scenes: int = 2) -> Body:
    """MapAnything's captured body and normalised images ``[scenes, 3, 3, 168, 518]``."""
    network = randomised(PoseNetwork(layout)).set_size(168, 518)
    images = torch.randn(scenes, 3, 3, 168, 518, generator=torch.Generator().manual_seed(1))
    return PoseBody(network), (images,)


def qwen_body(head: Callable[[QwenLayout], nn.Module], frames: int, reads: tuple[int, ...], rows: int = 2) -> Body:
    """A vision-language scorer's captured body and its inputs; one frame is an image, more are a video."""
    slices, grid = max(1, frames // 2), (4, 6)
    network = randomised(RewardQwen(QWEN, head(QWEN)))
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(rows, slices, grid[0] * grid[1], QWEN.patch_values, generator=generator)
    ids = torch.randint(0, 400, (rows, 40), generator=generator)
    visual = slices * grid[0] * grid[1] // QWEN.merge**2
    return StaticBody(network, grid, 40, range(5, 5 + visual)), (patches, ids, torch.tensor([reads] * rows))


BODIES: dict[str, Callable[[], Body]] = {
    "mapanything_v1.1": lambda: pose_body(POSE_1_1),
    "mapanything_v1": lambda: pose_body(POSE_1),
    "videoalign": lambda: qwen_body(videoalign_head, 4, (30, 35)),
    "videoalign_with_text": lambda: qwen_body(videoalign_head, 4, (30, 35, 39)),
    "hpsv3": lambda: qwen_body(hpsv3_head, 1, (38,)),
}
"""Every body that a scorer captures, small."""


def tiny_geometry(device: str) -> GeometryReward:
    """The geometry reward with a small MapAnything on ``device``; a worker can build it, too."""
    network = randomised(PoseNetwork(POSE_1_1)).to(device)
    return GeometryReward(MapAnythingEvaluator(network, device=device, scenes_per_forward=1))


def spell(text: str) -> list[int]:
    """A tokenizer: one id per letter, one per special token."""
    words = re.findall(r"<\|[^|]*\|>|.", text, flags=re.DOTALL)
    specials = ("<|image_pad|>", "<|Reward|>")
    return [400 + specials.index(word) if word in specials else sum(word.encode()) % 256 for word in words]


def tiny_hpsv3(device: str) -> Hpsv3Reward:
    """HPSv3 with a small body on ``device``; frames run one at a time, so no batch shape depends on a chunk."""
    network = randomised(RewardQwen(QWEN, hpsv3_head(QWEN))).to(device)
    return Hpsv3Reward(network, spell, "Judge: {text_prompt}\n", "so <|Reward|>", frames_per_forward=1)
