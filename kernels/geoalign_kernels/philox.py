"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number is a pure function of (seed, iteration, group, sample, step, stream, element): it depends neither on the rank
layout nor on the order of calls nor on the device. The layout below is frozen, because checkpoints and committed
results rely on it:

    key     = (seed & 0xffffffff, iteration)
    counter = (element // 4, step + (stream << 16), sample, group)

Output words o0..o3 of block k give the normals of elements 4k..4k+3 by Box-Muller:

    u(o) = ((o >> 9) + 0.5) * 2^-23          exact in float32, inside (0, 1)
    z0, z1 = sqrt(-2 ln u(o0)) * (cos, sin)(2 pi u(o1))        z2, z3 likewise from (o2, o3)

The integer words are equal bit for bit on every device. The normals are evaluated in float64 and rounded once here, in
float32 in the Triton kernel: they agree to ``NORMAL_ATOL``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign_kernels import streams

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
# Largest difference between the normals of two devices: the radius is below 5.77; its logarithm and root carry at most
# 3 ulp in float32 (1.1e-6 of 5.77), sine and cosine 1.2e-7 each (0.7e-6).
NORMAL_ATOL = 2e-6
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """Names one noise tensor; ``group`` and ``sample`` are global ids inside the iteration.

    Attributes:
        seed: run seed; its low 32 bits count.
        iteration: training iteration, 0 <= iteration < 2^32.
        group: id of the condition, an int or an int tensor [B].
        sample: id of the rollout in its group, an int or an int tensor [B]. Use 0 for noise shared by a group.
        step: step index of the sampler, 0 <= step < 2^16.
        stream: purpose of the numbers (``streams``), 0 <= stream < 2^16.
    """

    seed: int
    iteration: int
    group: Tensor | int
    sample: Tensor | int
    step: int
    stream: int = streams.SDE

    def __post_init__(self) -> None:
        for name, value, bits in (
            ("iteration", self.iteration, 32),
            ("step", self.step, 16),
            ("stream", self.stream, 16),
        ):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"NoiseKey.{name} must be in [0, 2^{bits}), got {value}")

    @property
    def words(self) -> tuple[int, int, int]:
        """The scalar part of key and counter: (key word 0, key word 1, counter word 1)."""
        return self.seed & MASK32, self.iteration, self.step + (self.stream << 16)

    def lanes(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """``(group, sample)`` as two int64 tensors [B]; B is ``batch`` or what the two broadcast to.

        Raises:
            ValueError: the ids do not broadcast to [batch].
        """
        device = next((ids.device for ids in (self.group, self.sample) if isinstance(ids, Tensor)), None)
        group, sample = torch.broadcast_tensors(_ids("group", self.group, device), _ids("sample", self.sample, device))
        if batch is not None and group.numel() != batch:
            if group.numel() != 1:
                raise ValueError(f"NoiseKey names {group.numel()} samples, but the batch has {batch}")
            group, sample = group.expand(batch), sample.expand(batch)
        return group, sample


def _ids(name: str, value: Tensor | int, device: torch.device | None) -> Tensor:
    if isinstance(value, int):
        return torch.full((1,), value & MASK32, dtype=torch.int64, device=device)
    if value.is_floating_point() or value.dim() > 1:
        raise ValueError(
            f"NoiseKey.{name} must be an int or an integer tensor [B], got {value.dtype} {list(value.shape)}"
        )
    return value.reshape(-1).to(torch.int64) & MASK32


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of broadcastable int64 counter words in [0, 2^32); returns the four output words likewise.

    A 32 x 32 bit product wraps modulo 2^64 in int64 arithmetic, so its two halves are still the exact ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product2 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0, c2 = _high_xor(product2, c1, k0), _high_xor(product0, c3, k1)
        c1, c3 = product2.bitwise_and_(MASK32), product0.bitwise_and_(MASK32)
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return c0, c1, c2, c3


def _high_xor(product: Tensor, word: Tensor, key: int) -> Tensor:
    # The shift is arithmetic: xor first, mask last, and one mask clears the copied sign bits.
    return (product >> 32).bitwise_xor(word ^ key).bitwise_and_(MASK32)


def philox_blocks(num_blocks: int, key: NoiseKey, batch: int | None = None) -> tuple[Tensor, ...]:
    """Words o0..o3 of blocks 0..num_blocks-1, each int64 [B, num_blocks] on the device of the key's id tensors."""
    group, sample = key.lanes(batch)
    key0, key1, counter1 = key.words
    block = torch.arange(num_blocks, device=group.device).expand(group.numel(), -1)
    step = torch.full((1, 1), counter1, device=group.device)
    return philox_words((block, step, sample[:, None], group[:, None]), (key0, key1))


def philox_normal(
    shape_per_sample: Sequence[int],
    key: NoiseKey,
    *,
    batch: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals, float32 [B, *shape_per_sample]; B as in ``NoiseKey.lanes``.

    Element e of a sample is the e-th in row-major order of ``shape_per_sample``.
    """
    count = math.prod(shape_per_sample)
    words = philox_blocks(-(-count // 4), key, batch)
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    normals = normals.flatten(1)[:, :count].reshape(-1, *shape_per_sample)
    return normals.to(device=device) if device is not None else normals


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    radius = _open_unit(radius_word).log_().mul_(-2.0).sqrt_()
    angle = _open_unit(angle_word).mul_(2.0 * math.pi)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def _open_unit(word: Tensor) -> Tensor:
    return (word >> 9).double().add_(0.5).mul_(2.0**-23)


def philox_uniform(
    n: int, seed: int, iteration: int, group: Tensor | int, sample: Tensor | int, step: int, stream: int
) -> Tensor:
    """Uniforms of the open interval (0, 1), float64: [n] for int ids, [B, n] for id tensors [B].

    Element e uses words (o0, o1) of block e // 2 if e is even, (o2, o3) if odd: 26 bits of each, plus half a step,
    which float64 holds exactly, so 0 and 1 never occur.
    """
    words = philox_blocks(-(-n // 2), NoiseKey(seed, iteration, group, sample, step, stream))
    pairs = [((high >> 6) << 26 | (low >> 6)).double() for high, low in (words[:2], words[2:])]
    uniforms = torch.stack(pairs, dim=-1).add_(0.5).mul_(2.0**-52).flatten(1)[:, :n]
    batched = isinstance(group, Tensor) or isinstance(sample, Tensor)
    return uniforms if batched else uniforms[0]
