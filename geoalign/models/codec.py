"""The embedded default's codec: a fixed orthonormal lapped patch transform (no weights, no training).

Each patch of P x P pixels becomes one latent position whose channels are its lowest-frequency coefficients. A plain
patch DCT would cut the picture at patch borders; here neighbouring patches overlap (Malvar's lapped orthogonal
transform: a pre-filter across every border, then a DCT), so truncating coefficients leaves no seams. The transform is
orthonormal: decoding is the transpose, and the error of a round trip is exactly the energy of the dropped coefficients.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from geoalign.errors import UsageError

# Rows: luma, red-blue, green-magenta. Orthonormal, so that colour and space transforms together stay orthonormal.
_COLOUR = torch.tensor(
    [
        [1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)],
        [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)],
        [1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)],
    ],
    dtype=torch.float64,
)


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II matrix ``[size, size]``, one basis function a row."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _dct4(size: int) -> Tensor:
    """Orthonormal DCT-IV matrix ``[size, size]``."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    return torch.cos(math.pi * (n + 0.5) * (k + 0.5) / size) * math.sqrt(2 / size)


@cache
def lapped_transform(length: int, patch: int) -> Tensor:
    """Orthonormal lapped transform of ``length`` samples in blocks of ``patch``, float64 ``[length, length]``.

    Rows ``k * patch .. (k + 1) * patch - 1`` are the basis functions of block k, lowest frequency first. The pre-filter
    acts on ``patch`` samples around every inner border (half on each side); the outer borders are left alone.
    Source: H. S. Malvar, Signal Processing with Lapped Transforms, 1992 (time-domain form).
    """
    half = patch // 2
    identity, flip = torch.eye(half, dtype=torch.float64), torch.eye(half, dtype=torch.float64).flip(0)
    butterfly = torch.cat([torch.cat([identity, flip], 1), torch.cat([flip, -identity], 1)]) / math.sqrt(2)
    rotation = flip @ _dct(half).T @ _dct4(half) @ flip
    middle = torch.block_diag(identity, rotation)
    border = butterfly @ middle @ butterfly
    transform = torch.eye(length, dtype=torch.float64)
    for edge in range(patch, length, patch):
        transform[edge - half : edge + half] = border @ transform[edge - half : edge + half]
    return torch.block_diag(*[_dct(patch)] * (length // patch)) @ transform


class PatchCodec(nn.Module):
    """Lapped orthonormal patch codec; implements the LatentCodec protocol, frame by frame (any frame count).

    Args:
        patch: patch size P in pixels (even); frame sizes must be multiples of it.
        luma: lowest ``luma x luma`` coefficients kept of the luma plane.
        chroma: lowest ``chroma x chroma`` coefficients kept of each of the two colour planes.

    The per-channel scale ``channel_std`` ``[C]`` is fitted once (:meth:`fit`) and travels with the checkpoint.
    """

    name = "patch"
    frame_rule = "any number of frames"
    channel_std: Tensor

    def __init__(self, patch: int = 16, luma: int = 5, chroma: int = 3) -> None:
        super().__init__()
        if patch % 2 or not 0 < chroma <= luma <= patch:
            raise UsageError(
                f"PatchCodec(patch={patch}, luma={luma}, chroma={chroma}): need an even patch >= luma >= chroma > 0"
            )
        self.patch, self.luma, self.chroma = patch, luma, chroma
        self.latent_channels = luma * luma + 2 * chroma * chroma
        self.register_buffer("channel_std", torch.ones(self.latent_channels))

    def check_frames(self, num_frames: int) -> None:
        """Any positive frame count is accepted."""
        if num_frames < 1:
            raise UsageError(f"a video needs at least one frame, got {num_frames}")

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) for a video of ``num_frames`` x ``height`` x ``width``."""
        self.check_frames(num_frames)
        if height % self.patch or width % self.patch:
            raise UsageError(f"frame size {height} x {width} is not a multiple of the patch size {self.patch}")
        return self.latent_channels, num_frames, height // self.patch, width // self.patch

    def encode(self, video: Tensor) -> Tensor:
        """Encode ``[B, F, 3, H, W]`` in [-1, 1] to ``[B, C, F, h, w]`` with unit variance per channel."""
        return self._analyse(video) / self.channel_std[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``[B, C, F, h, w]`` to a video ``[B, F, 3, H, W]``; the transpose of :meth:`encode`."""
        batch, _, frames, rows, columns = latents.shape
        x = (latents * self.channel_std[:, None, None, None]).movedim(1, -1)  # [B, F, h, w, C]
        planes = []
        for keep, part in zip(self._keeps(), x.split([k * k for k in self._keeps()], dim=-1), strict=True):
            vertical, horizontal = self._basis(rows, keep, x), self._basis(columns, keep, x)
            block = part.reshape(batch, frames, rows, columns, keep, keep).transpose(3, 4)
            block = block.reshape(batch, frames, rows * keep, columns * keep)
            planes.append(vertical.T @ block @ horizontal)
        return torch.einsum("bfphw,pc->bfchw", torch.stack(planes, 2), _COLOUR.to(x))

    @torch.no_grad()
    def fit(self, videos: Tensor, floor: float = 0.2) -> PatchCodec:
        """Set ``channel_std`` from example videos ``[B, F, 3, H, W]``.

        Weak channels are lifted by ``floor`` times the largest, which keeps high-frequency noise from being blown up
        to unit variance.
        """
        raw = self._analyse(videos)
        std = raw.movedim(1, 0).flatten(1).std(dim=1)
        self.channel_std.copy_(std + floor * std.max())
        return self

    def _keeps(self) -> tuple[int, int, int]:
        return self.luma, self.chroma, self.chroma

    def _analyse(self, video: Tensor) -> Tensor:
        batch, frames, _, height, width = video.shape
        _, _, rows, columns = self.latent_shape(frames, height, width)
        planes = torch.einsum("bfchw,pc->pbfhw", video, _COLOUR.to(video))
        parts = []
        for keep, plane in zip(self._keeps(), planes, strict=True):
            block = self._basis(rows, keep, video) @ plane @ self._basis(columns, keep, video).T
            block = block.reshape(batch, frames, rows, keep, columns, keep).transpose(3, 4)
            parts.append(block.reshape(batch, frames, rows, columns, keep * keep))
        return torch.cat(parts, dim=-1).movedim(-1, 1)

    def _basis(self, blocks: int, keep: int, like: Tensor) -> Tensor:
        """The kept rows ``[blocks * keep, blocks * patch]`` of the lapped transform."""
        full = lapped_transform(blocks * self.patch, self.patch).reshape(blocks, self.patch, -1)
        return full[:, :keep].reshape(blocks * keep, -1).to(like)
