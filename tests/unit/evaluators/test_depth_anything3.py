"""Depth Anything 3 through a stand-in module with the published call signature (depth-anything-3 0.1.1)."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoalign.config.rewards import RewardConfig
from geoalign.errors import ConfigError, RewardError, UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.depth_anything3 import DepthAnything3Evaluator, build_evaluator
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.registry import build_rewards
from geoalign.types import SourceClip

WORLD = so3.rigid(so3.exp(torch.tensor([0.4, -0.3, 0.2])), torch.tensor([3.0, -1.0, 2.0]))


def true_camera(red: Tensor) -> Tensor:
    """Camera-to-world ``[V, 4, 4]`` of frames by their red level in [0, 1]: metres along x, radians about y."""
    along, zero = red - red[:1], torch.zeros_like(red)
    return so3.rigid(so3.exp(torch.stack([zero, along, zero], -1)), torch.stack([2 * along, zero, zero], -1))


class DepthAnything3(torch.nn.Module):
    """The published class: poses are world-to-camera, in a world of the network's choice."""

    metric = 1
    calls: list[dict[str, Any]]

    @classmethod
    def from_pretrained(cls, name: str, *, local_files_only: bool = False) -> DepthAnything3:
        if name == "nowhere" or not local_files_only:
            raise OSError("no such folder")
        model = cls()
        model.calls = []
        return model

    def inference(
        self, image, extrinsics=None, intrinsics=None, align_to_input_ext_scale=True, infer_gs=False,
        use_ray_pose=False, ref_view_strategy="saddle_balanced", render_exts=None, render_ixts=None, render_hw=None,
        process_res=504, process_res_method="upper_bound_resize", export_dir=None, export_format="mini_npz",
        export_feat_layers=None, conf_thresh_percentile=40.0, num_max_points=1_000_000, show_cameras=True,
        feat_vis_fps=15, export_kwargs={},  # noqa: B006
    ):  # fmt: skip
        assert extrinsics is None and intrinsics is None and export_dir is None
        assert all(isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape[2] == 3 for x in image)
        self.calls.append({"frames": len(image), "reference": ref_view_strategy, "side": process_res})
        red = torch.tensor([float(x[..., 0].mean()) / 255 for x in image])
        if red[0] > 0.99:
            raise AssertionError("Insufficient non-sky pixels for alignment")
        if red[0] < 0.01:
            raise AssertionError("shapes differ")
        w2c = so3.invert_rigid(so3.compose(WORLD, true_camera(red)))[:, :3].numpy()
        scale = 2.0 + 0.1 * float(torch.rand(()))  # the metric branch samples pixels at random
        depth = np.stack([np.full(x.shape[:2], 10 * float(x[..., 0].mean()) / 255, np.float32) for x in image])
        return types.SimpleNamespace(extrinsics=w2c, is_metric=self.metric or {}, scale_factor=scale, depth=depth)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depth_anything_3", types.ModuleType("depth_anything_3"))
    monkeypatch.setitem(sys.modules, "depth_anything_3.api", types.SimpleNamespace(DepthAnything3=DepthAnything3))


def video_of(reds: tuple[tuple[float, ...], ...], height: int = 48, width: int = 64) -> Tensor:
    """``[B, F, 3, H, W]``: the red level is that of the frame, green and blue show a still picture."""
    red = (torch.tensor(reds) * 255).round() / 127.5 - 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    video = (0.6 * torch.sin(5 * x) * torch.cos(4 * y)).expand(*red.shape, 3, height, width).clone()
    video[:, :, 0] = red[..., None, None]
    return video


def clip(video: Tensor) -> SourceClip:
    batch, frames = video.shape[:2]
    return SourceClip(video, CameraTrajectory.build(torch.eye(4).repeat(batch, frames, 1, 1)), None, ("c",) * batch)


REDS = ((0.2, 0.3, 0.5, 0.4, 0.6), (0.7, 0.5, 0.4, 0.2, 0.1))


def test_poses_are_inverted_rebased_and_in_metres(package: None) -> None:
    video = video_of(REDS)
    evaluate = build_evaluator("weights/da3", device="cpu", longest_side=252)
    assert isinstance(evaluate, PoseEvaluator)
    estimate = evaluate(video, clip(video))
    levels = torch.tensor([[round(255 * r) / 255 for r in row] for row in REDS])
    # The stand-in inverts in float32 in a world some metres away: a few roundings of that.
    torch.testing.assert_close(estimate.c2w, torch.stack([true_camera(row) for row in levels]), rtol=0, atol=5e-6)
    assert estimate.frame_indices.tolist() == [0, 1, 2, 3, 4] and estimate.tracked.tolist() == [1, 1]
    assert evaluate.model.calls == [{"frames": 5, "reference": "first", "side": 252}] * 2
    subset = build_evaluator("weights/da3", device="cpu", frame_stride=3)(video, clip(video))
    assert subset.frame_indices.tolist() == [0, 3, 4]
    torch.testing.assert_close(subset.c2w, estimate.c2w[:, [0, 3, 4]])


def test_depth_is_that_of_the_prediction(package: None) -> None:
    """The stand-in's is ten metres times the red level; a film of sky alone has none."""
    evaluate = build_evaluator("weights/da3", device="cpu")
    found = evaluate.depth(video_of(REDS)[0])
    assert found is not None and found.shape == (5, 48, 64) and found.dtype == torch.float32
    levels = torch.tensor([10 * round(255 * red) / 255 for red in REDS[0]])
    torch.testing.assert_close(found, levels[:, None, None].expand(5, 48, 64))
    assert evaluate.depth(video_of(((1.0, 1.0),))[0]) is None


def test_scores_repeat_and_nobody_elses_draws_are_touched(package: None) -> None:
    video = video_of(REDS)
    evaluate = build_evaluator("weights/da3", device="cpu")
    state = torch.get_rng_state()
    first, second = (evaluate(video, clip(video)).diagnostics["metric_scale"] for _ in range(2))
    assert torch.equal(first, second) and (first > 2).all() and torch.equal(torch.get_rng_state(), state)


def test_videos_without_a_camera_are_lost_and_broken_ones_fail(package: None) -> None:
    """Only sky: the model gives up, which is the video's fault. A NaN pixel is a failure of the run."""
    video = video_of((REDS[0], (1.0, 1.0, 1.0, 1.0, 1.0), REDS[1]))
    video[2, 1, 0, 0, 0] = torch.nan
    evaluate = build_evaluator("weights/da3", device="cpu")
    estimate = evaluate(video, clip(video))
    assert estimate.tracked[1] == 0 and torch.equal(estimate.c2w[1], torch.eye(4).expand(5, 4, 4))
    assert torch.isnan(estimate.c2w[2]).all() and torch.isfinite(estimate.c2w[:2]).all()
    noise = torch.rand(1, 5, 3, 120, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert evaluate(noise, clip(noise)).tracked.item() == 0
    with pytest.raises(AssertionError, match="shapes differ"):  # any other failure of the package stays one
        evaluate(video_of(((0.0, 0.1),)), clip(video_of(((0.0, 0.1),))))


def test_what_is_missing_or_has_no_metres_is_named(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="hf download depth-anything/DA3NESTED-GIANT-LARGE"):
        build_evaluator("nowhere")
    with pytest.raises(UsageError, match="multiple of 14"):
        DepthAnything3Evaluator(None, longest_side=500)
    config = RewardConfig(kind="source_consistency", options={"evaluator": "depth_anything_3"})
    with pytest.raises(ConfigError, match="measures no residual"):
        build_rewards({"x": config})
    monkeypatch.setattr(DepthAnything3, "metric", 0)
    video = video_of(REDS)
    with pytest.raises(UsageError, match="not in metres"):
        build_evaluator("weights/da3", device="cpu")(video, clip(video))
    monkeypatch.setitem(sys.modules, "depth_anything_3.api", None)
    with pytest.raises(RewardError, match="pip install --no-deps depth-anything-3"):
        build_evaluator("weights/da3")
