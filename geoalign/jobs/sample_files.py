"""The files of one retake: the video, source and retake side by side, both camera paths, and what was used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoalign.data.plots import plot_cameras
from geoalign.data.video import write_video
from geoalign.errors import UsageError, argument
from geoalign.files.atomic import atomic_write_json, nan_to_none
from geoalign.policy.published import CRF, truncated
from geoalign.types import RetakeBatch
from geoalign.version import __version__

SIDE_BY_SIDE = ".side_by_side.mp4"
"""End of the name of the video that shows source and retake in one picture."""


def outputs(out: Path) -> dict[str, Path]:
    """Everything that is written, by what it is.

    Raises:
        UsageError: ``out`` is no .mp4.
    """
    if out.suffix != ".mp4":
        raise UsageError(f"{argument('out', out, str(out))} must end in .mp4")
    suffixes = {"video": ".mp4", "side_by_side": SIDE_BY_SIDE, "cameras": ".cameras.png", "settings": ".json"}
    return {name: out.with_suffix(suffix) for name, suffix in suffixes.items()}


def candidate_path(out: Path, seed: int) -> Path:
    """Where ``sample --keep-all`` puts the retake of one seed: ``out.seed3.mp4`` of ``out.mp4``."""
    return out.with_suffix(f".seed{seed}.mp4")


def used_values(
    guidance: float, prompt: str | None, negative_prompt: str, camera_file: str | Path | None, estimator: str | None
) -> dict[str, Any]:
    """What a retake was made with, given or found: entries of ``used`` in its JSON.

    Args:
        guidance: scale of classifier-free guidance.
        prompt, negative_prompt: as they were encoded; the latter is used in the second pass of guidance alone.
        camera_file: preset or file of which something is used: poses, lens, ground plane.
        estimator: what read the source's poses from its pictures, if anything did.
    """
    file = None if camera_file is None else str(camera_file)
    return {
        "guidance": guidance,
        "prompt": prompt,
        "negative_prompt": negative_prompt if guidance != 1.0 else None,
        "camera_file": file,
        "source_camera": None if estimator is not None else file,
        "source_estimator": estimator,
    }


def write_retake(
    out: Path,
    batch: RetakeBatch,
    video: Tensor,
    fps: float,
    record: Mapping[str, Any],
    used: Mapping[str, Any],
    *,
    published: bool = False,
) -> dict[str, Path]:
    """Write all :func:`outputs` of a retake; returns them.

    Args:
        out: the video.
        batch: the one condition.
        video: ``[1, F, 3, H, W]`` in [-1, 1].
        fps: frames per second.
        record: more entries of the JSON, among them ``arguments`` with the source ``video``.
        used: the :func:`used_values`.
        published: round and compress the video as the published script does.
    """
    beside, video, source = outputs(out), video.cpu(), batch.source
    if published:
        write_video(beside["video"], truncated(video[0]), fps, crf=CRF)
    else:
        write_video(beside["video"], video[0], fps)
    write_video(beside["side_by_side"], torch.cat([source.video[0], video[0]], -1), fps)
    plot_cameras(beside["cameras"], {"source": source.camera.c2w[0], "target": batch.target_camera.c2w[0]})
    settings = {
        "geoalign": __version__,
        "torch": torch.__version__,
        **record,
        "used": {**used, "fps": fps, "frames": video.shape[1], "size": list(video.shape[-2:])},
        "files": {name: str(path) for name, path in beside.items()},
        "target_c2w": batch.target_camera.c2w[0].tolist(),
        "source_c2w": source.camera.c2w[0].tolist(),
        "intrinsics": batch.target_camera.intrinsics[0, 0].tolist(),
        "ground_plane": None if source.ground_plane is None else source.ground_plane[0].tolist(),
    }
    atomic_write_json(beside["settings"], nan_to_none(settings))
    return beside
