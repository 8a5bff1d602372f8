"""The two records that all parts exchange: what is known of a source clip, and what is asked of a retake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoalign.errors import DataError
from geoalign.geometry.trajectory import CameraTrajectory


def _pick(values: tuple[str, ...], index: Tensor) -> tuple[str, ...]:
    return tuple(values[i] for i in index.tolist())


@dataclass(frozen=True, slots=True, eq=False)
class SourceClip:
    """What anyone may know about B source videos.

    Attributes:
        video: ``[B, F, 3, H, W]`` float32 in [-1, 1].
        camera: ``[B, F]`` camera-to-world relative to source frame 0.
        ground_plane: ``[B, 4]`` (nx, ny, nz, d) with ``n . X = d`` in the camera axes of source frame 0, metres: the
            "known depth" of the embedded world; None where no plane is known.
        clip_ids: B names.
    """

    video: Tensor
    camera: CameraTrajectory
    ground_plane: Tensor | None
    clip_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        batch = self.video.shape[0]
        plane = batch if self.ground_plane is None else len(self.ground_plane)
        if not batch == len(self.camera) == plane == len(self.clip_ids):
            sizes = f"video {batch}, camera {len(self.camera)}, plane {plane}, ids {len(self.clip_ids)}"
            raise DataError(f"a source clip's parts have different batch sizes: {sizes}")

    def __len__(self) -> int:
        return self.video.shape[0]

    def select(self, index: Tensor | Sequence[int]) -> SourceClip:
        """The clips at ``index`` (integers, repeats allowed), on the same device."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.video.device)
        plane = None if self.ground_plane is None else self.ground_plane[index]
        return SourceClip(self.video[index], self.camera[index], plane, _pick(self.clip_ids, index))

    def repeat_interleave(self, repeats: int) -> SourceClip:
        """Each clip ``repeats`` times in a row."""
        return self.select(torch.arange(len(self)).repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> SourceClip:
        """Copy the tensors to ``device``."""
        plane = None if self.ground_plane is None else self.ground_plane.to(device)
        return SourceClip(self.video.to(device), self.camera.to(device), plane, self.clip_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Encodings:
    """What was encoded of B conditions before training; None where nothing was.

    Attributes:
        latents: ``[B, C, T, h, w]`` of the source video.
        context: ``[B, L, D]`` text embedding, zero beyond each prompt's length; L is the longest of the batch.
        image_tokens: ``[B, N, D]`` of the first source frame.
        negative: ``[B, L, D]`` text embedding of the negative prompt.
    """

    latents: Tensor | None = None
    context: Tensor | None = None
    image_tokens: Tensor | None = None
    negative: Tensor | None = None

    def __len__(self) -> int:
        return next((len(part) for part in self._parts if part is not None), 0)

    def select(self, index: Tensor) -> Encodings:
        """The encodings at ``index`` (integers, repeats allowed)."""
        return self._map(lambda part: part[index.to(part.device)])

    def to(self, device: torch.device | str) -> Encodings:
        """Copy the tensors to ``device``."""
        return self._map(lambda part: part.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Encodings:
        return Encodings(*(None if part is None else change(part) for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.latents, self.context, self.image_tokens, self.negative


@dataclass(frozen=True, slots=True, eq=False)
class RetakeBatch:
    """B conditions: a source clip, the wanted camera path and a prompt each.

    Attributes:
        source: B source clips.
        target_camera: ``[B, F]``, frame 0 is the identity (the first view of the source).
        prompts: B strings.
        encodings: prepared latents and embeddings, or None: the policy encodes the source itself.
        fps: frames per second of the videos, where a file says so.
    """

    source: SourceClip
    target_camera: CameraTrajectory
    prompts: tuple[str, ...]
    encodings: Encodings | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if not len(self.source) == len(self.target_camera) == len(self.prompts):
            sizes = f"source {len(self.source)}, target camera {len(self.target_camera)}, prompts {len(self.prompts)}"
            raise DataError(f"a retake batch's parts have different batch sizes: {sizes}")
        if self.encodings is not None and len(self.encodings) != len(self.source):
            raise DataError(f"{len(self.encodings)} encodings for {len(self.source)} conditions")

    def __len__(self) -> int:
        return len(self.source)

    def select(self, index: Tensor | Sequence[int] | slice) -> RetakeBatch:
        """The conditions at ``index`` (integers, repeats allowed, or a slice)."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        index = torch.as_tensor(index, dtype=torch.long, device=self.source.video.device)
        camera = self.target_camera[index.to(self.target_camera.device)]
        encodings = None if self.encodings is None else self.encodings.select(index)
        return RetakeBatch(self.source.select(index), camera, _pick(self.prompts, index), encodings, self.fps)

    def first_frames(self, frames: int, latent_frames: int) -> RetakeBatch:
        """The same cut short: a causal video encoder makes of the first frames the first latents."""
        if frames >= self.source.video.shape[1]:
            return self
        kept = slice(frames)
        source = replace(self.source, video=self.source.video[:, kept], camera=self.source.camera.frames(kept))
        encodings = self.encodings
        if encodings is not None and encodings.latents is not None:
            encodings = replace(encodings, latents=encodings.latents[:, :, :latent_frames])
        return replace(self, source=source, target_camera=self.target_camera.frames(kept), encodings=encodings)

    def repeat_interleave(self, repeats: int) -> RetakeBatch:
        """Each condition ``repeats`` times in a row: the layout of a group of rollouts."""
        return self.select(torch.arange(len(self)).repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> RetakeBatch:
        """Copy the tensors to ``device``."""
        encodings = None if self.encodings is None else self.encodings.to(device)
        return RetakeBatch(self.source.to(device), self.target_camera.to(device), self.prompts, encodings, self.fps)
