"""What a source clip is like, for slices of the tables: the share that moves, and the share that is near.

Each is None where its source is missing, which tables print as "not available".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoalign.data.clips import is_frame, natural_key
from geoalign.data.frames import cover_crop
from geoalign.errors import DataError

NEAR_M = 2.0
"""Metres: what is nearer is near foreground. The longest preset path at speed 1 is about as long."""


def annotation_folder(clip: Path) -> Path | None:
    """The masks ``Annotations/RESOLUTION/NAME`` of a clip ``JPEGImages/RESOLUTION/NAME`` in the layout of DAVIS."""
    resolution = clip.absolute().parent
    if resolution.parent.name != "JPEGImages":
        return None
    folder = resolution.parent.parent / "Annotations" / resolution.name / clip.name
    return folder if folder.is_dir() else None


def dynamic_share(clip: Path, frames: int, size: tuple[int, int] | None = None) -> float | None:
    """Share of the pixels of a clip's first ``frames`` frames that belong to an annotated object.

    DAVIS annotates what moves by itself, so it is a lower bound of what does.

    Args:
        clip: folder of frames in the layout of DAVIS.
        frames: as many, from the first.
        size: (H, W) that the frames are scaled to cover and cut to, so that the share is of what a model sees.

    Returns None unless each of the frames has a mask (DAVIS' test sets have that of the first alone).
    Raises DataError for a mask that cannot be read.
    """
    folder = annotation_folder(clip)
    masks = sorted(filter(is_frame, folder.iterdir()), key=lambda path: natural_key(path.name)) if folder else []
    if not frames or len(masks) < frames:
        return None
    return float(np.mean([_share(path, size) for path in masks[:frames]]))


def _share(path: Path, size: tuple[int, int] | None) -> float:
    try:
        with Image.open(path) as picture:
            labels = np.array(picture)  # a palette's indices, of which 0 is the background
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable mask ({error})") from error
    marked = labels.any(-1) if labels.ndim == 3 else labels != 0
    area = torch.from_numpy(marked.astype(np.uint8) * 255)[None, None]
    return float((area if size is None else cover_crop(area, size)).float().mean()) / 255


def near_foreground(depth: Tensor | None, near_m: float = NEAR_M) -> float | None:
    """Share of the pixels with a depth that are nearer than ``near_m``.

    Args:
        depth: ``[F, H, W]`` metres, of an estimator (:meth:`DepthAnything3Evaluator.depth`); None where there is none.
        near_m: the limit.

    Returns None without a depth, or without a pixel that has one.
    """
    if depth is None:
        return None
    seen = depth[torch.isfinite(depth) & (depth > 0)]
    return float((seen < near_m).double().mean()) if seen.numel() else None
