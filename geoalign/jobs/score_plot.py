"""Picture of a scored video: the camera path that was read from it beside the wanted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from geoalign.data.plots import PNG_MARK, plot_cameras
from geoalign.errors import DataError
from geoalign.files.atomic import check_writable
from geoalign.types import RetakeBatch


def plot_path(video: Path) -> Path:
    """``clip.mp4.png`` of ``clip.mp4``: no two videos of a folder share a picture."""
    return video.with_name(f"{video.name}.png")


def check_plot(video: Path) -> None:
    """Raises DataError when the picture could not be written, or would replace a file that is none of ours."""
    path = plot_path(video)
    check_writable(path)
    if path.exists() and not _ours(path):
        raise DataError(f"{path}: exists and was not written by geoalign; move it away or score without --plot")


def _ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return PNG_MARK.items() <= picture.info.items()
    except (OSError, UnidentifiedImageError, ValueError):
        return False


def plot_scored(path: Path, reward: Any, video: Tensor, batch: RetakeBatch) -> None:
    """Draw target and estimated path of the scored ``video`` beside its file; the reward's estimate is not made anew.

    Args:
        path: the video's file.
        reward: a reward with an ``evaluator``, which has just scored these very tensors.
        video: ``[1, F, 3, H, W]``.
        batch: its condition.
    """
    estimate = reward.evaluator(video, batch.source)
    plot_cameras(plot_path(path), {"target": batch.target_camera.c2w[0], "estimated": estimate.c2w[0].cpu()})
