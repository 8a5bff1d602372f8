"""MEt3R by its Python API: mean over frames of the score of (source frame i, retake frame i) as pairs; lower is better.

The arguments are those of the published evaluation. Options: ``device``, where auto takes CUDA if there is any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build the metric once; it serves every case."""
    import torch
    from met3r import MEt3R

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    metric = MEt3R(
        img_size=None, use_norm=True, backbone="mast3r", feature_backbone="dino16",
        feature_backbone_weights="mhamilton723/FeatUp", upsampler="featup", distance="cosine", freeze=True,
    ).to(device)  # fmt: skip

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        source, retake = (frames(request[name], request["frames"]) for name in ("source_video", "retake_video"))
        scores = []
        with torch.no_grad():
            for ours, theirs in zip(source, retake, strict=True):
                pair = torch.stack([signed(ours), signed(theirs, ours.shape[:2])])[None]
                score, *_ = metric(
                    images=pair.to(device), return_overlap_mask=False, return_score_map=False, return_projections=False
                )
                scores.append(float(score.mean()))
        return {"met3r": float(np.mean(scores))}

    return measure


def frames(video: str, count: int) -> list[Any]:
    """``count`` frames ``[H, W, 3]`` uint8 of a video that must have as many."""
    import av

    with av.open(video) as film:
        found = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    if len(found) != count:
        raise ValueError(f"{video} holds {len(found)} of {count} frames")
    return found


def signed(frame: Any, size: Any = None) -> Any:
    """``[3, H, W]`` in [-1, 1], scaled to ``size`` if it has another."""
    import torch

    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255.0
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False)
    return (2 * pixels[0] - 1).clip(-1, 1)
