"""Coloured, band-limited ground maps whose value at any ground point is a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

# Deep water, shallows, sand, meadow, forest, rock, snow: evenly spaced along "elevation", RGB in [0, 255].
_PALETTE = torch.tensor(
    [[24, 62, 104], [58, 134, 158], [214, 196, 146], [140, 170, 92], [62, 112, 70], [120, 112, 104], [236, 238, 240]],
    dtype=torch.float32,
)
_WAVES, _TINT_WAVES = 10, 3


@dataclass(frozen=True, slots=True)
class Scene:
    """B ground maps, each a sum of plane waves mapped through a palette.

    Attributes:
        wave: ``[B, K, 2]`` wave vectors in rad/m; the last ``_TINT_WAVES`` carry light and dark, the others elevation.
        phase: ``[B, K]`` rad.
        amplitude: ``[B, K]``.
        palette: ``[B, P, 3]`` colours in [-1, 1] along elevation.
    """

    wave: Tensor
    phase: Tensor
    amplitude: Tensor
    palette: Tensor

    def __getitem__(self, index: slice | Tensor) -> Scene:
        return Scene(self.wave[index], self.phase[index], self.amplitude[index], self.palette[index])


def sample_scenes(count: int, generator: Generator, *, style: str = "synthetic") -> Scene:
    """Draw scenes in the style "synthetic" (pre-training) or "real" (RL and evaluation: other waves and colours)."""
    shortest, longest = (5.5, 13.0) if style == "synthetic" else (5.0, 11.0)
    shape = (count, _WAVES + _TINT_WAVES)
    length = shortest * (longest / shortest) ** torch.rand(shape, generator=generator)
    angle = torch.rand(shape, generator=generator) * 2 * math.pi
    wave = (2 * math.pi / length)[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    amplitude = length.sqrt() * (0.6 + 0.8 * torch.rand(shape, generator=generator))
    for part in (slice(0, _WAVES), slice(_WAVES, None)):
        amplitude[:, part] /= amplitude[:, part].square().sum(1, keepdim=True).sqrt() / math.sqrt(2)
    phase = torch.rand(shape, generator=generator) * 2 * math.pi
    spread = 8.0 if style == "synthetic" else 11.0
    palette = _PALETTE + spread * torch.randn(count, 1, 3, generator=generator)
    palette = palette + 0.5 * spread * torch.randn(count, len(_PALETTE), 3, generator=generator)
    return Scene(wave, phase, amplitude, palette.clamp(8, 247) / 127.5 - 1)


def colour(scene: Scene, ground: Tensor) -> Tensor:
    """Colour of ground points ``[B, N, 2]`` (metres) as ``[B, N, 3]`` in [-1, 1]."""
    angle = torch.baddbmm(scene.phase[:, None], ground, scene.wave.transpose(1, 2)).sin_()
    elevation = (angle[..., :_WAVES] * scene.amplitude[:, None, :_WAVES]).sum(-1)
    tint = (angle[..., _WAVES:] * scene.amplitude[:, None, _WAVES:]).sum(-1, keepdim=True)
    steps = scene.palette.shape[1] - 1
    # Elevation is close to a unit Gaussian; the logistic curve spreads it evenly along the palette.
    position = torch.sigmoid(1.1 * elevation) * steps
    # Smooth blend of neighbouring colours (triangular weights of width 2 would show kinks; these do not).
    knots = torch.arange(steps + 1, dtype=ground.dtype)
    weight = torch.exp(-(((position[..., None] - knots) / 0.9) ** 2))
    shade = (weight / weight.sum(-1, keepdim=True)) @ scene.palette
    return (shade + 0.10 * tint).clamp(-1, 1)
