"""What a retake is conditioned on, and the step-independent part of the network that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
    """

    source_latents: Tensor | None = None
    source_camera: CameraTrajectory | None = None
    target_camera: CameraTrajectory | None = None
    ground_plane: Tensor | None = None
    context: Tensor | None = None
    image_tokens: Tensor | None = None

    def repeat_interleave(self, count: int) -> Conditioning:
        """Repeat every condition ``count`` times in a row (G samples of a group lie next to each other)."""
        return self._map(lambda part: part.repeat_interleave(count, 0), lambda camera: camera.repeat_interleave(count))

    def select(self, index: Tensor | slice) -> Conditioning:
        """The conditions at ``index`` (a slice, or int64 ``[N]``)."""
        return self._map(lambda part: part[index], lambda camera: camera[index])

    def with_context(self, context: Tensor) -> Conditioning:
        """The same conditions with other text, as for the unconditional pass of guidance."""
        return replace(self, context=context)

    def _map(self, tensor, camera) -> Conditioning:  # type: ignore[no-untyped-def]
        cameras = ("source_camera", "target_camera")
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Conditioning(
            **{k: None if v is None else (camera if k in cameras else tensor)(v) for k, v in parts.items()}
        )


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and sine of rotary angles, ``[B or 1, N, heads or 1, head_dim / 2]`` float32."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def from_angle(angle: Tensor) -> Rotation:
        """Rotation by ``angle`` in radians."""
        return Rotation(angle.cos(), angle.sin())

    def inverse(self) -> Rotation:
        """The opposite rotation."""
        return Rotation(self.cos, -self.sin)

    def __getitem__(self, tokens: slice) -> Rotation:
        return Rotation(self.cos[:, tokens], self.sin[:, tokens])


@dataclass(frozen=True, slots=True)
class LayerRotation:
    """Rotations of one self-attention layer: of q and k (position, camera), and of the output (v gets its inverse)."""

    qk: Rotation
    vo: Rotation | None = None


@dataclass(frozen=True, slots=True)
class LayerAngles:
    """What :class:`LayerRotation` says, in radians: the fused kernels compute cosines and sines where they use them.

    Attributes:
        position: ``[N, head_dim / 2]`` float32, or None when ``phase_qk`` holds the position too.
        phase_qk: ``[B, N, heads, P]``, added to the position of the last P pairs of every head, or None.
        phase_vo: ``[B, N, heads, P]`` of the output (v gets the opposite), or None.
    """

    position: Tensor | None
    phase_qk: Tensor | None = None
    phase_vo: Tensor | None = None


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


@dataclass(frozen=True, slots=True)
class ConditionCache:
    """Everything in a forward pass that depends neither on the noisy latents nor on the timestep.

    Attributes:
        source_tokens: ``[B, N_source, dim]`` patch embedding of the source latents, or None.
        token_offset: ``[B, N, dim]`` camera tokens added to the patch embedding (target first), or None.
        camera_tokens: ``[B, N, dim]`` adapter output from which learned phases are computed in each block, or None.
        poses: ``[B, N, 12]`` camera pose of every token (ReCamMaster), or None.
        rotations: per layer, when the phases are the same at every step and small (geometric), or empty.
        cross: per layer.
    """

    source_tokens: Tensor | None = None
    token_offset: Tensor | None = None
    camera_tokens: Tensor | None = None
    poses: Tensor | None = None
    rotations: tuple[LayerRotation, ...] | tuple[LayerAngles, ...] = ()
    cross: tuple[CrossKeys, ...] = ()

    def repeat_interleave(self, count: int) -> ConditionCache:
        """The cache of ``conditioning.repeat_interleave(count)`` without computing it again."""
        return _on_tensors(self, lambda tensor: tensor.repeat_interleave(count, 0))

    def select(self, index: Tensor | slice) -> ConditionCache:
        """The cache of ``conditioning.select(index)``."""
        return _on_tensors(self, lambda tensor: tensor[index])


def _on_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor inside nested dataclasses and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_on_tensors(item, change) for item in value)
    if value is None:
        return None
    return type(value)(*(_on_tensors(getattr(value, name), change) for name in value.__slots__))
