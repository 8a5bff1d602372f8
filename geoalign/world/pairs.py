"""Paired renders (source, target and truth of one scene): for pre-training and evaluation only, never for RL."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from geoalign.config.world import WorldConfig
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.types import RetakeBatch, SourceClip
from geoalign.world.motion import (
    PRESETS,
    ground_plane,
    phase,
    preset,
    preset_motions,
    preset_sizes,
    random_curves,
    source_drift,
    to_c2w,
)
from geoalign.world.render import intrinsics, render
from geoalign.world.scene import Scene, sample_scenes

PROMPT = "an aerial view of a landscape"


@dataclass(frozen=True, slots=True)
class LabelBias:
    """How wrong the pre-training labels are, per axis and growing over the clip.

    True motion = label x exp((mean + std n) (start + rise s)), with n ~ N(0, 1) clipped at 2, drawn once per video and
    axis, and s = 0..1 the progress over the clip. Axes: sideways, forward, vertical, yaw.
    This plants the fault that the paper describes in base models, a drifting metric scale, at a known size.
    """

    mean: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    std: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    start: float = 1.0
    rise: float = 0.0

    @staticmethod
    def translation(factor: float) -> LabelBias:
        """True translation is ``factor`` times the label, in all of the clip; the rotation is the label's."""
        return LabelBias((math.log(factor),) * 3 + (0.0,))

    def draw(self, count: int, frames: int, generator: Generator) -> Tensor:
        """Factors ``[count, frames, 4]`` from label motion to true motion."""
        noise = torch.randn(count, 1, 4, generator=generator).clamp(-2, 2)
        level = torch.tensor(self.mean) + torch.tensor(self.std) * noise
        return torch.exp(level * (self.start + self.rise * phase(frames))[:, None])


@dataclass(frozen=True, slots=True)
class PairedVideos:
    """Conditions with the true target video.

    Attributes:
        batch: conditions; ``batch.target_camera`` is the *label*, which equals the truth only without label bias.
        truth: ``[B, F, 3, H, W]`` true render along the true path; frame 0 equals the source's frame 0.
        names: what each path is.
        scenes, world: what was filmed, and with which camera.
    """

    batch: RetakeBatch
    truth: Tensor
    names: tuple[str, ...]
    scenes: Scene
    world: WorldConfig

    def select(self, rows: Tensor) -> PairedVideos:
        """The pairs at ``rows`` (int64)."""
        names = tuple(self.names[row] for row in rows.tolist())
        return PairedVideos(self.batch.select(rows), self.truth[rows], names, self.scenes[rows], self.world)

    def along(self, c2w: Tensor) -> Tensor:
        """True renders ``[B, K, 3, H, W]`` along other cameras ``[B, K, 4, 4]``, relative to the first source frame."""
        plane = self.batch.source.ground_plane
        assert plane is not None
        return render(self.scenes, c2w, plane, self.world)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutScene:
    """One scene of the RL style that no clip shows, whose true retake along any path can be rendered.

    Attributes:
        name: names the scene: everything of it is a function of the seed and the name.
        source_c2w: ``[1, F, 4, 4]`` of the source.
        plane: ``[1, 4]`` ground plane.
        reach, turn: ``[1]`` metres and radians of its presets (:func:`geoalign.world.motion.preset`).
    """

    world: WorldConfig
    name: str
    scene: Scene
    source_c2w: Tensor
    plane: Tensor
    reach: Tensor
    turn: Tensor

    @staticmethod
    def draw(world: WorldConfig, seed: int, name: str) -> HeldOutScene:
        """The scene called ``name``."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        low, high = world.height_m
        height = low + (high - low) * torch.rand(1, generator=generator)
        scene = sample_scenes(1, generator, style="real", streets=world.streets)
        drift = to_c2w(source_drift(1, world.frames, generator), world)
        reach, turn = preset_sizes(1, generator)
        return HeldOutScene(world, name, scene, drift, ground_plane(world, height), reach, turn)

    def source(self) -> SourceClip:
        """The rendered source, a batch of one."""
        lens = intrinsics(self.world).expand(1, self.world.frames, 4)
        video = render(self.scene, self.source_c2w, self.plane, self.world)
        return SourceClip(video, CameraTrajectory(self.source_c2w, lens), self.plane, (self.name,))

    def target(self, path: str, speed: float) -> CameraTrajectory:
        """``[1, F]`` a preset path of the world at a multiple of its speed."""
        motion = speed * preset(path, self.world.frames, self.reach, self.turn)
        return CameraTrajectory.build(to_c2w(motion, self.world), intrinsics(self.world))

    def truth(self, target: CameraTrajectory) -> Tensor:
        """``[1, F, 3, H, W]`` the true retake along ``target``."""
        return render(self.scene, target.c2w, self.plane, self.world)


def paired_videos(
    world: WorldConfig,
    count: int,
    generator: Generator,
    *,
    paths: Literal["random", "presets"] = "random",
    style: str = "synthetic",
    bias: LabelBias | None = None,
) -> PairedVideos:
    """Render ``count`` source and target videos of fresh scenes."""
    low, high = world.height_m
    height = low + (high - low) * torch.rand(count, generator=generator)
    scenes = sample_scenes(count, generator, style=style, streets=world.streets)
    source_c2w = to_c2w(source_drift(count, world.frames, generator), world)
    label = (
        random_curves(count, world.frames, generator)
        if paths == "random"
        else preset_motions(count, world.frames, generator)
    )
    true = label if bias is None else label * bias.draw(count, world.frames, generator)
    plane = ground_plane(world, height)
    videos = render(scenes, torch.cat([source_c2w, to_c2w(true, world)[:, 1:]], dim=1), plane, world)
    source, target = videos.split([world.frames, world.frames - 1], dim=1)
    lens = intrinsics(world).expand(count, world.frames, 4)
    names = tuple(PRESETS[i % len(PRESETS)] if paths == "presets" else f"random_{i:02d}" for i in range(count))
    batch = RetakeBatch(
        source=SourceClip(source, CameraTrajectory(source_c2w, lens), plane, names),
        target_camera=CameraTrajectory(to_c2w(label, world), lens),
        prompts=(PROMPT,) * count,
    )
    return PairedVideos(batch, torch.cat([source[:, :1], target], dim=1), names, scenes, world)
