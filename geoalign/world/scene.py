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
_TINT = 0.10  # strength of light and dark

# Streets: half their width and how soft their edges are (the scale of a logistic curve), in metres; their brightness.
_HALF_WIDTH_M, _SOFTNESS_M, _STREET = 0.6, 0.25, 0.55
_MAP_SHARE, _BLOCK_TONE = 0.7, 0.15  # contrast of the map that blocks keep, and of the blocks against each other


@dataclass(frozen=True, slots=True)
class Scene:
    """B ground maps, each a sum of plane waves mapped through a palette.

    Attributes:
        wave: ``[B, K, 2]`` wave vectors in rad/m; the last ``_TINT_WAVES`` carry light and dark, the others elevation.
        phase: ``[B, K]`` rad.
        amplitude: ``[B, K]``.
        palette: ``[B, P, 3]`` colours in [-1, 1] along elevation.
        streets: ``[B, 5]`` direction in rad, offsets and distances in metres of two crossing families of streets; None
            for a map without.
    """

    wave: Tensor
    phase: Tensor
    amplitude: Tensor
    palette: Tensor
    streets: Tensor | None = None

    def __getitem__(self, index: slice | Tensor) -> Scene:
        streets = None if self.streets is None else self.streets[index]
        return Scene(self.wave[index], self.phase[index], self.amplitude[index], self.palette[index], streets)


def sample_scenes(count: int, generator: Generator, *, style: str = "synthetic", streets: bool = False) -> Scene:
    """Draw scenes in the style "synthetic" (pre-training) or "real" (RL and evaluation: other waves and colours).

    Real scenes have a denser grid of streets too, if ``streets`` asks for one.
    """
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
    lanes = _sample_streets(count, generator, style) if streets else None
    return Scene(wave, phase, amplitude, palette.clamp(8, 247) / 127.5 - 1, lanes)


def _sample_streets(count: int, generator: Generator, style: str) -> Tensor:
    nearest, farthest = (6.5, 10.0) if style == "synthetic" else (6.0, 9.0)
    unit = torch.rand(count, 5, generator=generator)
    distance = nearest + (farthest - nearest) * unit[:, 3:]
    return torch.cat([unit[:, :1] * math.pi / 2, unit[:, 1:3] * distance, distance], dim=1)


def colour(scene: Scene, ground: Tensor) -> Tensor:
    """Colour of ground points ``[B, N, 2]`` (metres) as ``[B, N, 3]`` in [-1, 1]."""
    steps = scene.palette.shape[1] - 1
    # Elevation is close to a unit Gaussian; the logistic curve spreads it evenly along the palette.
    position = torch.sigmoid(1.1 * _waves(scene, ground, slice(0, _WAVES))) * steps
    # Smooth blend of neighbouring colours (triangular weights of width 2 would show kinks; these do not).
    knots = torch.arange(steps + 1, dtype=ground.dtype)
    weight = torch.exp(-(((position - knots) / 0.9) ** 2))
    shade = (weight / weight.sum(-1, keepdim=True)) @ scene.palette
    tint = _TINT * _waves(scene, ground, slice(_WAVES, None))
    if scene.streets is None:
        return (shade + tint).clamp(-1, 1)
    street, centre = _street_grid(scene.streets, ground)
    tone = _BLOCK_TONE * _waves(scene, centre, slice(_WAVES, None))
    block = (_MAP_SHARE * shade + tint + tone).clamp(-1, 1)
    return block + street * (_STREET - block)


def _waves(scene: Scene, ground: Tensor, part: slice) -> Tensor:
    """Sum of the waves of ``part`` at ground points ``[B, N, 2]``: ``[B, N, 1]``."""
    angle = torch.baddbmm(scene.phase[:, None, part], ground, scene.wave[:, part].transpose(1, 2)).sin_()
    return (angle * scene.amplitude[:, None, part]).sum(-1, keepdim=True)


def _street_grid(streets: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """How much street there is at ground points ``[B, N, 2]`` (``[B, N, 1]``), and the centre of their block."""
    direction, offset, distance = streets[:, None].split([1, 2, 2], dim=-1)
    cos, sin = direction.cos(), direction.sin()
    place = (_turned(ground, cos, sin) - offset) / distance  # whole numbers are the middle of a street
    nearest = ((place - place.round()).abs() * distance).amin(-1, keepdim=True)
    street = torch.sigmoid((_HALF_WIDTH_M - nearest) / _SOFTNESS_M)
    return street, _turned((place.floor() + 0.5) * distance + offset, cos, -sin)


def _turned(points: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Coordinates of points ``[B, N, 2]`` along axes that are turned by an angle."""
    x, y = points[..., :1], points[..., 1:]
    return torch.cat([x * cos + y * sin, y * cos - x * sin], -1)
