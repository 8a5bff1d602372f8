"""How intrinsics follow frames that are scaled to cover a size and cut in the centre."""

from __future__ import annotations

from torch import Tensor


def cover_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after scaling ``height x width`` until it covers ``size = (H, W)``."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def cover_crop_intrinsics(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Intrinsics of frames that were scaled to cover ``size`` and cut in the centre.

    Args:
        intrinsics: ``[..., 4]`` (fx, fy, cx, cy) as fractions of (W, H, W, H) of the ``height x width`` frame.
        height: frame height before the crop.
        width: frame width before the crop.
        size: (H, W) after it.

    Returns:
        ``[..., 4]`` as fractions of the new frame, same dtype.
    """
    gain, shift = _crop(intrinsics, height, width, size)
    return intrinsics * gain - shift


def intrinsics_before_crop(intrinsics: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`cover_crop_intrinsics`: from fractions of frames of ``size`` to those of ``height x width``."""
    gain, shift = _crop(intrinsics, height, width, size)
    return (intrinsics + shift) / gain


def _crop(like: Tensor, height: int, width: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gain and shift ``[4]`` of the intrinsics of ``height x width`` frames that become ``size``."""
    scaled_height, scaled_width = cover_size(height, width, size)
    top, left = (scaled_height - size[0]) // 2, (scaled_width - size[1]) // 2
    gain = like.new_tensor([scaled_width / size[1], scaled_height / size[0]]).repeat(2)
    return gain, like.new_tensor([0.0, 0.0, left / size[1], top / size[0]])
