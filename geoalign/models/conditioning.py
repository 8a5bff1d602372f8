"""What a retake is conditioned on, and the step-independent part of the network that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from geoalign.geometry.trajectory import CameraTrajectory


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Conditions of B retakes; parts that the model does not use may be None.

    Attributes:
        source_latents: ``[B, C, T, h, w]`` clean, normalised latents of the source video.
        source_camera: B trajectories of F video frames relative to source frame 0, metres.
        target_camera: B trajectories of F video frames; frame 0 is the identity.
        ground_plane: ``[B, 4]`` (nx, ny, nz, d) with n . X = d in source-frame-0 camera axes, metres.
        context: ``[B, L, text_dim]`` text encoder output, zero beyond each prompt's length.
        image_tokens: ``[B, 257, image_dim]`` CLIP tokens of the first source frame.
        negative: ``[B, L, text_dim]`` text encoder output of the negative prompt, for classifier-free guidance.
    """

    source_latents: Tensor | None = None
    source_camera: CameraTrajectory | None = None
    target_camera: CameraTrajectory | None = None
    ground_plane: Tensor | None = None
    context: Tensor | None = None
    image_tokens: Tensor | None = None
    negative: Tensor | None = None

    def repeat_interleave(self, count: int) -> Conditioning:
        """Repeat every condition ``count`` times in a row (G samples of a group lie next to each other)."""
        return self._map(lambda part: repeated(part, count), lambda camera: camera.repeat_interleave(count))

    def select(self, index: Tensor | slice) -> Conditioning:
        """The conditions at ``index`` (a slice, or int64 ``[N]``)."""
        return self._map(lambda part: part[index], lambda camera: camera[index])

    def _map(self, tensor, camera) -> Conditioning:  # type: ignore[no-untyped-def]
        cameras = ("source_camera", "target_camera")
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Conditioning(
            **{k: None if v is None else (camera if k in cameras else tensor)(v) for k, v in parts.items()}
        )


@dataclass(frozen=True, slots=True)
class Phases:
    """Rotary camera phases of one self-attention layer in radians, each ``[B, N, heads or 1, P]``.

    A phase acts on the last P channel pairs of every head, on top of the token's position.

    Attributes:
        qk: of queries and keys.
        vo: of the output; values get the opposite.
    """

    qk: Tensor
    vo: Tensor


@dataclass(frozen=True, slots=True)
class CrossKeys:
    """Keys and values of one cross-attention, ``[B, heads, L, head_dim]``; or its output when there is one key.

    Attributes:
        text, image: (key, value) pairs, or None.
        constant: ``[B, 1, dim]`` output of the whole layer when softmax over the single text token is identically 1.
    """

    text: tuple[Tensor, Tensor] | None = None
    image: tuple[Tensor, Tensor] | None = None
    constant: Tensor | None = None

    @property
    def batch(self) -> int:
        """B."""
        known = self.constant if self.text is None else self.text[0]
        assert known is not None
        return known.shape[0]


@dataclass(frozen=True, slots=True)
class ConditionCache:
    """Everything in a forward pass that depends neither on the noisy latents nor on the timestep.

    Attributes:
        source_tokens: ``[B, N_source, dim]`` patch embedding of the source latents, or None.
        token_offset: ``[B, N, dim]`` camera tokens added to the patch embedding (target first), or None.
        camera_tokens: ``[B, N, dim]`` adapter output that learned phases are made of, or None.
        poses: ``[B, N, 12]`` camera pose of every token (ReCamMaster), or None.
        phases: per layer; empty where a model has none, or makes them of ``camera_tokens`` in every layer.
        cross: per layer.
        negative: per layer, of the negative prompt (classifier-free guidance), or empty.
    """

    source_tokens: Tensor | None = None
    token_offset: Tensor | None = None
    camera_tokens: Tensor | None = None
    poses: Tensor | None = None
    phases: tuple[Phases, ...] = ()
    cross: tuple[CrossKeys, ...] = ()
    negative: tuple[CrossKeys, ...] = ()

    def repeat_interleave(self, count: int) -> ConditionCache:
        """The cache of ``conditioning.repeat_interleave(count)`` without computing it again."""
        return on_tensors(self, lambda tensor: repeated(tensor, count))

    def select(self, index: Tensor | slice) -> ConditionCache:
        """The cache of ``conditioning.select(index)``; a slice is a view."""
        return on_tensors(self, lambda tensor: tensor[index])


def repeated(tensor: Tensor, count: int) -> Tensor:
    """``tensor.repeat_interleave(count, 0)``; one sample is only viewed ``count`` times, whatever its size."""
    return tensor.expand(count, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor.repeat_interleave(count, 0)


def joined(values: Sequence[Any]) -> Any:
    """One batch of several that have the same parts: nested dataclasses and tuples of tensors, row after row."""
    first = values[0]
    if len(values) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, tuple):
        return tuple(joined(items) for items in zip(*values, strict=True))
    return type(first)(*(joined([getattr(value, name) for value in values]) for name in first.__slots__))


def on_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor inside nested dataclasses and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(on_tensors(item, change) for item in value)
    if value is None:
        return None
    return type(value)(*(on_tensors(getattr(value, name), change) for name in value.__slots__))
