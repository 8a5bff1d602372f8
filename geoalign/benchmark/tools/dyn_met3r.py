"""Dyn-MEt3R, written from its description: does every second frame of a video look, from the next one, as that one?

The static pixels of every second frame become points that carry features; the cloud is drawn into the frames between
them, and compared there with their own features by cosine. Higher is better. Camera, depth and masks are ViPE's,
features are FeatUp's; what lies between is this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from geoalign.benchmark.records import CaseFiles, ToolResult
from geoalign.benchmark.tools.answers import Scene, read_features, read_scene
from geoalign.benchmark.tools.settings import ToolSettings, contents_of
from geoalign.benchmark.tools.splat import Disc, splat, unproject
from geoalign.benchmark.tools.worker import ToolFailure
from geoalign.benchmark.tools.worker_tool import build_worker, caught, request_of, workplace
from geoalign.frozen.device import named_device

_HOLE = -10_000.0
"""Every feature of a pixel that no point covers. Compared like the rest, so holes lower the score."""


@dataclass(frozen=True, slots=True)
class DynScore:
    """A score and what it is made of.

    Attributes:
        score: mean cosine over the static pixels of all frames between, holes included, as published.
        holes: share of these pixels that no point covers.
    """

    score: float
    holes: float


def split_frames(frames: int) -> tuple[list[int], list[int]]:
    """Frames that become points, ``F // 2 + 1`` spread over the video, and the frames between them."""
    sources = sorted({int(index) for index in np.linspace(0, frames - 1, frames // 2 + 1)})
    return sources, [index for index in range(frames) if index not in sources]


@torch.no_grad()
def dyn_met3r(
    scene: Scene,
    features: np.ndarray[Any, Any],
    *,
    pixel_centre: float = 0.5,
    disc: Disc | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DynScore:
    """Score a video.

    Args:
        scene: camera, depth and masks of F frames.
        features: ``[F, C, H, W]`` of any float dtype; read frame by frame.
        pixel_centre: where in a pixel its point lies (:func:`unproject`). The published evaluation has 0 here and its
            renderer 0.5: half a pixel apart, so that a camera that stands still sees no point at all.
        disc: how points are drawn; default as published.
        device, dtype: where and in what it is computed.

    Raises ToolFailure where there is nothing to compare: fewer than three frames, or no static pixel.
    """
    size = (scene.depth.shape[1], scene.depth.shape[2])
    depth, camera = scene.depth.to(device, dtype), scene.camera.to(dtype=torch.float64)
    static = (~scene.moving.to(device)) & torch.isfinite(depth) & (depth > 0)
    sources, targets = split_frames(len(depth))
    if not targets:
        raise ToolFailure("incomplete output", f"Dyn-MEt3R needs three frames, the video has {len(depth)}")
    read = lambda frame: torch.from_numpy(np.array(features[frame])).to(device)  # noqa: E731 - one expression, twice
    points = torch.cat([
        unproject(depth[f], camera.c2w[f].to(device), camera.intrinsics[f], pixel_centre=pixel_centre)[static[f]]
        for f in sources
    ])  # fmt: skip
    carried = torch.cat([read(f).permute(1, 2, 0)[static[f]] for f in sources])
    total, holes, count = 0.0, 0, 0
    for frame in targets:
        compared = ~scene.moving[frame].to(device)
        pose, lens = camera.c2w[frame].to(device), camera.intrinsics[frame]
        seen, covered = splat(points, carried, pose, lens, size, disc)
        seen[~covered] = _HOLE
        own = read(frame).permute(1, 2, 0)[compared].to(dtype)
        total += float(F.cosine_similarity(own, seen[compared], dim=-1).double().sum())
        holes += int((compared & ~covered).sum())
        count += int(compared.sum())
    if not count:
        raise ToolFailure("incomplete output", "no pixel of the frames to compare is static")
    return DynScore(total / count, holes / count)


class DynMet3rTool:
    """A :class:`~geoalign.benchmark.records.Tool`: ViPE's scene, FeatUp's features, our projection.

    Its metrics: ``dyn_met3r`` as published, ``dyn_met3r_holes`` the share of pixels that are holes there, and
    ``dyn_met3r_centred`` with points in the middle of their pixels.
    """

    metrics: tuple[str, ...] = ("dyn_met3r", "dyn_met3r_holes", "dyn_met3r_centred")
    gives_poses = False

    def __init__(self, name: str, settings: ToolSettings) -> None:
        self.name, self.licence, self._settings = name, settings.licence, settings
        self._scene, self._features = build_worker(settings, "scene"), build_worker(settings, "features")

    def measure(self, case_files: CaseFiles, out: Path) -> ToolResult:
        """See :class:`~geoalign.benchmark.records.Tool`."""
        frames, device = case_files.frames, named_device("auto")
        with workplace(out) as work, caught(out, self._scene, self._features) as outcome:
            request = request_of(case_files)
            scene = self._scene.ask(request, work / "scene", lambda folder: read_scene(folder, frames))
            size = (scene.depth.shape[1], scene.depth.shape[2])
            request["retake_video"] = str((work / "scene" / "rgb.mp4").absolute())
            features = self._features.ask(
                request, work / "features", lambda folder: read_features(folder, frames, size)
            )
            published = dyn_met3r(scene, features, pixel_centre=0.0, device=device)
            centred = dyn_met3r(scene, features, device=device)
            values = (published.score, published.holes, centred.score)
            outcome.append(ToolResult("ok", "", dict(zip(self.metrics, values, strict=True))))
        return outcome[-1]

    def contents(self) -> dict[str, str]:
        """See :class:`~geoalign.benchmark.records.Tool`."""
        return contents_of(self._settings)

    def close(self) -> None:
        """End both processes."""
        self._scene.close()
        self._features.close()
