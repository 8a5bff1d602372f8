"""How the drone moves: four true degrees of freedom (3 of translation in metres, yaw about the vertical).

A motion is ``[B, F, 4]``: metres along e1 (right), e2 (backward over the ground: towards the bottom of the picture) and
down, and yaw in radians. :func:`to_c2w` turns it into ordinary camera-to-world matrices relative to the first frame.
The gimbal fixes pitch and roll, so the movements of this world (``PRESETS``) are its own, and none is a preset of the
literature.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from geoalign.config.world import WorldConfig
from geoalign.geometry.plane import ground_axes

PRESETS = (
    "sweep_right",
    "sweep_left",
    "fly_forward",
    "fly_backward",
    "slide_right",
    "slide_left",
    "descend",
    "climb",
    "arc_back_right",
    "arc_back_left",
)
"""Names of this world. Its ``sweep_right`` travels while it turns, unlike the published pure rotation ``pan_right``;
its ``arc_back_right`` backs off to the right and turns right, away from what it filmed, where the published
``arc_right`` closes in and turns left, towards it."""


def ground_normal(world: WorldConfig) -> Tensor:
    """The downward vertical in camera axes, ``[3]`` (the gimbal makes it the same for every frame)."""
    tilt = math.radians(world.tilt_deg)
    return torch.tensor([0.0, math.sin(tilt), math.cos(tilt)])


def ground_plane(world: WorldConfig, height: Tensor) -> Tensor:
    """Ground plane ``[B, 4]`` in first-frame camera axes for heights ``[B]`` in metres."""
    return torch.cat([ground_normal(world).expand(len(height), 3), height[:, None]], dim=-1)


def to_c2w(motion: Tensor, world: WorldConfig) -> Tensor:
    """Camera-to-world ``[..., 4, 4]`` (relative to the unmoved camera) of motions ``[..., 4]``."""
    normal = ground_normal(world).to(motion)
    axes = ground_axes(torch.cat([normal, normal.new_ones(1)]))
    skew = torch.zeros(3, 3, dtype=motion.dtype)
    skew[0, 1], skew[0, 2], skew[1, 2] = -normal[2], normal[1], -normal[0]
    skew = skew - skew.T
    yaw = motion[..., 3, None, None]
    c2w = torch.zeros(*motion.shape[:-1], 4, 4, dtype=motion.dtype)
    c2w[..., :3, :3] = torch.eye(3, dtype=motion.dtype) + yaw.sin() * skew + (1 - yaw.cos()) * (skew @ skew)
    c2w[..., :3, 3] = motion[..., :3] @ axes
    c2w[..., 3, 3] = 1
    return c2w


def phase(frames: int) -> Tensor:
    """Progress ``[F]`` of a path, 0 at the given first frame and 1 at the last."""
    return torch.arange(frames, dtype=torch.float32) / (frames - 1)


def source_drift(count: int, frames: int, generator: Generator) -> Tensor:
    """Slight straight drift of a hovering drone, ``[count, F, 4]`` (tens of centimetres, a degree or two)."""
    end = torch.randn(count, 1, 4, generator=generator) * torch.tensor([0.25, 0.25, 0.15, 0.03])
    return end * phase(frames)[None, :, None]


def random_curves(count: int, frames: int, generator: Generator) -> Tensor:
    """Random gently bent paths ``[count, F, 4]``.

    The largest distance from the first frame is 0.6 to 2.4 m, and the largest turn is at most 0.35 rad (20 degrees);
    either may be in any frame, as a path that bends back ends nearer.
    """
    line, bend = torch.randn(2, count, 1, 4, generator=generator)
    s = phase(frames)[None, :, None]
    motion = line * s + 0.6 * bend * 2 * s * (s - 1)
    motion[..., 2] *= 0.6
    length = _bounded_normal(count, 1.5, 0.5, 0.6, 2.4, generator)
    yaw = _bounded_normal(count, 0.16, 0.10, 0.0, 0.35, generator)
    reach = motion[..., :3].norm(dim=-1).amax(1)
    turn = motion[..., 3].abs().amax(1)
    scale = torch.cat([(length / reach)[:, None].expand(-1, 3), (yaw / (turn + 1e-6))[:, None]], dim=1)
    return motion * scale[:, None]


def preset(name: str, frames: int, size: Tensor, yaw: Tensor) -> Tensor:
    """One preset path ``[B, F, 4]`` with reach ``size`` ``[B]`` in metres and turn ``yaw`` ``[B]`` in radians.

    A sweep travels 0.4 of the reach; an arc all of it sideways and a third of it backward.
    """
    s = phase(frames)[None]
    reach, turn = size[:, None] * s, yaw[:, None] * s
    zero = torch.zeros_like(reach)
    arc_side = size[:, None] * (1.4 * s).sin() / math.sin(1.4)
    arc_back = 0.4 * size[:, None] * (1 - (1.4 * s).cos())
    paths = {
        "sweep_right": (0.4 * reach, zero, zero, turn),
        "sweep_left": (-0.4 * reach, zero, zero, -turn),
        "fly_forward": (zero, -reach, zero, zero),
        "fly_backward": (zero, reach, zero, zero),
        "slide_right": (reach, zero, zero, zero),
        "slide_left": (-reach, zero, zero, zero),
        "descend": (zero, zero, reach, zero),
        "climb": (zero, zero, -reach, zero),
        "arc_back_right": (arc_side, arc_back, zero, turn),
        "arc_back_left": (-arc_side, arc_back, zero, -turn),
    }
    return torch.stack(paths[name], dim=-1)


def preset_sizes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Reach (1.2 to 2.1 m) and turn (7 to 15 degrees, in radians) of presets, ``[count]`` each."""
    return 1.2 + 0.9 * torch.rand(count, generator=generator), 0.12 + 0.14 * torch.rand(count, generator=generator)


def preset_motions(count: int, frames: int, generator: Generator) -> Tensor:
    """``[count, F, 4]``: the presets in turn, each of its own size."""
    size, yaw = preset_sizes(count, generator)
    return torch.cat([preset(PRESETS[i % len(PRESETS)], frames, size[i : i + 1], yaw[i : i + 1]) for i in range(count)])


def _bounded_normal(count: int, mean: float, std: float, low: float, high: float, generator: Generator) -> Tensor:
    return (mean + std * torch.randn(count, generator=generator)).clamp(low, high)
