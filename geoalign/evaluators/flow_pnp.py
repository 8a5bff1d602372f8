"""Weight-free metric poses by optical-flow tracking and perspective-n-point, given the depth of frame 0 only.

Corners of frame 0 are lifted to 3D by known depth, followed from frame to frame by pyramidal Lucas-Kanade with a
forward-backward check, and every frame's camera is solved from the surviving points (RANSAC, SQPnP of Terzakis and
Lourakis 2020, Levenberg-Marquardt refinement). Sparse and feature-based where the planar aligner is dense and direct,
it can check that one. It wants frames of about 120 x 208 pixels or more: below, corner noise dominates small motions.
Valid only while frame 0 of the video shows the view of source frame 0, as it does for retakes.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoalign.errors import RewardError, UsageError
from geoalign.evaluators.base import NO_PLANE, PoseEstimate
from geoalign.geometry.plane import pixel_grid, pixel_rays
from geoalign.types import SourceClip

FrameDepth = Callable[[SourceClip, int, int], Tensor]
"""(source, height, width) -> z depth of source frame 0, ``[B, H, W]`` metres; non-finite or <= 0 where unknown."""

_LUMA = (0.299, 0.587, 0.114)
_LK_WINDOW, _LK_LEVELS = (15, 15), 3
_CORNER_QUALITY, _CORNER_BLOCK = 0.01, 5
_CELLS = (4, 6)
_RANSAC_ITERATIONS, _RANSAC_CONFIDENCE = 200, 0.999


def plane_depth(source: SourceClip, height: int, width: int) -> Tensor:
    """Depth of source frame 0 from its known ground plane, NaN where a ray misses the plane."""
    if source.ground_plane is None:
        raise UsageError(NO_PLANE.format("flow_pnp"))
    rays = pixel_rays(source.camera.intrinsics[:, 0], pixel_grid(height, width).to(source.ground_plane.device))
    plane = source.ground_plane
    # A ray with z = 1 meets n . X = d at depth d / (n . ray).
    approach = (rays * plane[:, None, :3]).sum(-1)
    depth = torch.where(approach > 1e-3, plane[:, 3:] / approach, torch.nan)
    return depth.unflatten(1, (height, width))


class _Track(NamedTuple):
    c2w: NDArray[np.float64]  # [F, 4, 4]
    explained: float
    residual_px: float
    lost_frames: int


class FlowPnpEvaluator:
    """PoseEvaluator by tracking and PnP on the CPU (OpenCV).

    ``tracked`` is the share of frame-0 points inside the estimated view that the estimate explains, averaged over
    frames 1..; a frame without a solution counts 0 and keeps the pose before it. ``residual`` is the mean reprojection
    error of the explained points in pixels (the RANSAC bound for frames without a solution).

    Args:
        frame_depth: depth of source frame 0; the ground plane of the clip by default.
        max_corners: corners taken from frame 0, spread over a grid of cells.
        forward_backward_px: a track that does not return to within this distance ends.
        ransac_px: largest reprojection error of an explained point.
        min_points: fewer explained points than this are no solution.
    """

    name = "flow_pnp"

    def __init__(
        self,
        *,
        frame_depth: FrameDepth = plane_depth,
        max_corners: int = 800,
        forward_backward_px: float = 0.5,
        ransac_px: float = 1.5,
        min_points: int = 12,
    ) -> None:
        if min_points < 6 or max_corners < max(min_points, math.prod(_CELLS)):
            raise UsageError(
                f"need 6 <= min_points <= max_corners and one corner for each of {math.prod(_CELLS)} cells, got "
                f"{min_points} and {max_corners}"
            )
        if not (0 < forward_backward_px < math.inf and 0 < ransac_px < math.inf):
            raise UsageError(
                f"forward_backward_px and ransac_px must be positive, got {forward_backward_px} and {ransac_px}"
            )
        try:
            self._cv: Any = importlib.import_module("cv2")
        except ImportError as error:
            raise RewardError(
                f"the flow_pnp evaluator needs OpenCV ({error}); run: pip install opencv-python-headless"
            ) from error
        self.frame_depth, self.max_corners, self.min_points = frame_depth, max_corners, min_points
        self.forward_backward_px, self.ransac_px = forward_backward_px, ransac_px

    @torch.no_grad()
    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Poses of all frames of ``video`` ``[B, F, 3, H, W]`` in [-1, 1]; NaN poses for a video with a NaN pixel."""
        _, frames, _, height, width = video.shape
        if frames < 2:
            raise UsageError(f"tracking needs at least 2 frames, got {frames}")
        depth = self.frame_depth(source, height, width).double().cpu().numpy()
        lens = source.camera.intrinsics[:, 0].double().cpu()
        # OpenCV puts pixel centres at integers, our fractions put them at half-integers.
        scale = torch.tensor([width, height, width, height], dtype=torch.float64)
        lens = (lens * scale - torch.tensor([0, 0, 0.5, 0.5])).numpy()
        luma = torch.einsum("bfchw,c->bfhw", video.float().cpu(), torch.tensor(_LUMA))
        finite = torch.isfinite(luma).flatten(1).all(dim=1)
        gray = ((torch.nan_to_num(luma) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        tracks = [self._track(*clip) for clip in zip(gray, depth, lens, strict=True)]
        c2w = torch.from_numpy(np.stack([track.c2w for track in tracks])).float()
        c2w = torch.where(finite[:, None, None, None], c2w, torch.nan)
        numbers = torch.tensor([track[1:] for track in tracks], dtype=torch.float32).to(video.device)
        return PoseEstimate(
            c2w=c2w.to(video.device),
            frame_indices=torch.arange(frames, device=video.device),
            tracked=numbers[:, 0],
            residual=numbers[:, 1],
            diagnostics={"lost_frames": numbers[:, 2]},
        )

    def _track(self, gray: NDArray[np.uint8], depth: NDArray[np.float64], lens: NDArray[np.float64]) -> _Track:
        """One clip: ``gray`` ``[F, H, W]``, ``depth`` ``[H, W]``, ``lens`` fx fy cx cy in pixels."""
        frames, height, width = gray.shape
        camera = np.array([[lens[0], 0, lens[2]], [0, lens[1], lens[3]], [0, 0, 1]])
        corners = self._corners(gray[0], depth)
        z = depth[corners[:, 1], corners[:, 0]]
        world = np.stack([(corners[:, 0] - lens[2]) / lens[0] * z, (corners[:, 1] - lens[3]) / lens[1] * z, z], axis=1)
        pixels, alive = corners.astype(np.float32), np.ones(len(corners), dtype=bool)
        c2w = np.tile(np.eye(4), (frames, 1, 1))
        explained, residual, lost = 0.0, 0.0, 0
        for i in range(1, frames):
            pixels, alive = self._follow(gray[i - 1], gray[i], pixels, alive)
            solution = self._solve(world[alive], pixels[alive], camera) if alive.sum() >= self.min_points else None
            if solution is None:
                c2w[i], residual, lost = c2w[i - 1], residual + self.ransac_px, lost + 1
                continue
            w2c, inliers, error = solution
            seen = world @ w2c[:3, :3].T + w2c[:3, 3]
            uv = seen[:, :2] / np.maximum(seen[:, 2:], 1e-6) * lens[:2] + lens[2:]
            visible = (seen[:, 2] > 0) & (uv >= 0).all(axis=1) & (uv <= (width - 1, height - 1)).all(axis=1)
            c2w[i] = np.linalg.inv(w2c)
            explained += min(1.0, inliers / max(int(visible.sum()), self.min_points))
            residual += error
        return _Track(c2w, explained / (frames - 1), residual / (frames - 1), lost)

    def _corners(self, first: NDArray[np.uint8], depth: NDArray[np.float64]) -> NDArray[np.int64]:
        """Corners ``[N, 2]`` (x, y) of frame 0, at whole pixels with known depth, an equal number from every cell.

        Corner strength is judged inside a cell: one sharp object, which may move, cannot take all corners.
        """
        known = (np.isfinite(depth) & (depth > 0)).astype(np.uint8)
        apart = max(3, first.shape[1] // 64)
        rows, columns = (np.linspace(0, side, n + 1).astype(int) for side, n in zip(first.shape, _CELLS, strict=True))
        found = []
        for top, bottom in itertools.pairwise(rows):
            for left, right in itertools.pairwise(columns):
                corners = self._cv.goodFeaturesToTrack(
                    first[top:bottom, left:right], self.max_corners // math.prod(_CELLS), _CORNER_QUALITY, apart,
                    mask=known[top:bottom, left:right], blockSize=_CORNER_BLOCK,
                )  # fmt: skip
                found += [] if corners is None else [corners.reshape(-1, 2) + np.array([left, top])]
        return np.concatenate(found).round().astype(np.int64) if found else np.zeros((0, 2), dtype=np.int64)

    def _follow(
        self, before: NDArray[np.uint8], after: NDArray[np.uint8], pixels: NDArray[np.float32], alive: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Advance the living tracks by one frame; ends those that leave, fail or do not return."""
        pixels, alive = pixels.copy(), alive.copy()
        index = np.flatnonzero(alive)
        if len(index) == 0:
            return pixels, alive
        options = {"winSize": _LK_WINDOW, "maxLevel": _LK_LEVELS}
        start = pixels[index].reshape(-1, 1, 2)
        there, ok, _ = self._cv.calcOpticalFlowPyrLK(before, after, start, None, **options)
        back, ok_back, _ = self._cv.calcOpticalFlowPyrLK(after, before, there, None, **options)
        drift = np.linalg.norm((back - start).reshape(-1, 2), axis=1)
        there = there.reshape(-1, 2)
        limit = (before.shape[1] - 1, before.shape[0] - 1)
        inside = (there >= 0).all(axis=1) & (there <= limit).all(axis=1)
        kept = (ok.ravel() == 1) & (ok_back.ravel() == 1) & (drift < self.forward_backward_px) & inside
        pixels[index[kept]] = there[kept]
        alive[index[~kept]] = False
        return pixels, alive

    def _solve(
        self, world: NDArray[np.float64], pixels: NDArray[np.float32], camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], int, float] | None:
        """World-to-camera ``[4, 4]``, number of explained points and their mean error in pixels; None without one."""
        cv, points = self._cv, pixels.astype(np.float64)
        ok, turn, shift, inliers = cv.solvePnPRansac(
            world,
            points,
            camera,
            None,
            iterationsCount=_RANSAC_ITERATIONS,
            reprojectionError=self.ransac_px,
            confidence=_RANSAC_CONFIDENCE,
            flags=cv.SOLVEPNP_SQPNP,
        )
        if not ok or inliers is None or len(inliers) < self.min_points:
            return None
        chosen = inliers.ravel()
        turn, shift = cv.solvePnPRefineLM(world[chosen], points[chosen], camera, None, turn, shift)
        projected, _ = cv.projectPoints(world[chosen], turn, shift, camera, None)
        error = float(np.linalg.norm(projected.reshape(-1, 2) - points[chosen], axis=1).mean())
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = cv.Rodrigues(turn)[0], shift.ravel()
        if not np.isfinite(w2c).all():
            return None
        return w2c, len(chosen), error
