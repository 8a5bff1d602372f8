"""Tracking + PnP against ray-cast ground truth: two textured planes, exact depth and exact cameras."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from geoalign.config.world import WorldConfig
from geoalign.errors import RewardError, UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.flow_pnp import FlowPnpEvaluator, plane_depth
from geoalign.geometry.plane import pixel_grid, pixel_rays
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.geometry import GeometryReward
from geoalign.types import RetakeBatch, SourceClip
from geoalign.world.pairs import paired_videos

HEIGHT, WIDTH, FRAMES = 120, 208, 9
LENS = (0.9, 0.9 * WIDTH / HEIGHT, 0.5, 0.5)
# A floor 1.2 m below the camera (y points down) and a wall 5 m ahead.
FLOOR, WALL = (0.0, 1.0, 0.0, 1.2), (0.0, 0.0, 1.0, 5.0)


def texture(seed: int) -> Tensor:
    """Band-limited colour noise, ``[1, 3, 512, 512]`` in [-1, 1], about 20 mm per texel over 10 m."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.rand(1, 3, n, n, generator=generator) * 2 - 1 for n in (48, 160))
    both = [F.interpolate(x, size=(512, 512), mode="bicubic", align_corners=False) for x in (coarse, fine)]
    return (0.6 * both[0] + 0.4 * both[1]).clamp(-1, 1)


TEXTURES = {FLOOR: texture(0), WALL: texture(1)}


def cast(c2w: Tensor) -> tuple[Tensor, Tensor]:
    """Image ``[3, H, W]`` and depth along z ``[H, W]`` of one camera, 4 rays per pixel."""
    fine = pixel_grid(2 * HEIGHT, 2 * WIDTH)
    local = pixel_rays(torch.tensor(LENS), fine)
    rays, origin = local @ c2w[:3, :3].T, c2w[:3, 3]
    depth = torch.full((len(rays),), math.inf)
    colour = torch.zeros(len(rays), 3)
    for plane, image in TEXTURES.items():
        normal, distance = torch.tensor(plane[:3]), plane[3]
        approach = rays @ normal
        hit = torch.where(approach > 1e-4, (distance - origin @ normal) / approach, math.inf)
        point = origin + rays * torch.where(hit.isfinite(), hit, 0.0)[:, None]
        place = point[:, [0, 2]] - torch.tensor([0.0, 4.0]) if plane == FLOOR else point[:, [0, 1]]
        sampled = F.grid_sample(image, place.view(1, 1, -1, 2) / 6, align_corners=False, padding_mode="reflection")
        nearer = (hit > 0) & (hit < depth)
        colour[nearer] = sampled[0, :, 0].T[nearer]
        depth = torch.where(nearer, hit, depth)
    picture = F.avg_pool2d(colour.T.view(1, 3, 2 * HEIGHT, 2 * WIDTH), 2)[0]
    return picture, depth.view(HEIGHT, 2, WIDTH, 2).mean(dim=(1, 3))


def path(metres: tuple[float, float, float], degrees: tuple[float, float, float], frames: int = FRAMES) -> Tensor:
    """Constant-velocity camera path ``[F, 4, 4]`` that ends at ``metres`` and the rotation vector ``degrees``."""
    c2w = torch.eye(4).repeat(frames, 1, 1)
    for i, share in enumerate(torch.linspace(0, 1, frames).tolist()):
        turn = Rotation.from_rotvec([share * d for d in degrees], degrees=True).as_matrix()
        c2w[i, :3, :3] = torch.from_numpy(turn).float()
        c2w[i, :3, 3] = share * torch.tensor(metres)
    return c2w


def render(c2w: Tensor) -> Tensor:
    return torch.stack([cast(pose)[0] for pose in c2w])


def depth_of_frame_0(source: SourceClip, height: int, width: int) -> Tensor:
    return cast(torch.eye(4))[1].expand(len(source), height, width)


def clip(video: Tensor, plane: Tensor | None = None) -> SourceClip:
    batch, frames = video.shape[:2]
    camera = CameraTrajectory.build(torch.eye(4).repeat(batch, frames, 1, 1), LENS)
    return SourceClip(video, camera, plane, tuple(str(i) for i in range(batch)))


def errors(estimate: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean error over frames 1.. in metres and degrees."""
    metres = (estimate[1:, :3, 3] - truth[1:, :3, 3]).norm(dim=-1).mean().item()
    relative = truth[1:, :3, :3].mT.double() @ estimate[1:, :3, :3].double()
    degrees = Rotation.from_matrix(relative.numpy()).magnitude().mean() * 180 / math.pi
    return metres, float(degrees)


MOVE, TURN = (0.5, -0.1, 0.4), (2.0, 6.0, 0.0)


@pytest.fixture(scope="module")
def honest() -> tuple[Tensor, Tensor]:
    truth = path(MOVE, TURN)
    return truth, render(truth)


@pytest.fixture(scope="module")
def evaluate() -> FlowPnpEvaluator:
    return FlowPnpEvaluator(frame_depth=depth_of_frame_0)


def score(evaluate: FlowPnpEvaluator, video: Tensor, truth: Tensor) -> tuple[float, float, float]:
    estimate = evaluate(video[None], clip(video[None]))
    return *errors(estimate.c2w[0], truth), estimate.tracked.item()


# Bounds below: a corner is located to about 0.1 px; at focal length 187 px, 3 m depth and some hundred corners that is
# a few millimetres and hundredths of a degree. Tracking drift over 8 frames multiplies it; the bounds leave a factor 3.
def test_reads_metres_and_degrees(evaluate: FlowPnpEvaluator, honest: tuple[Tensor, Tensor]) -> None:
    assert isinstance(evaluate, PoseEvaluator)
    truth, video = honest
    estimate = evaluate(video[None], clip(video[None]))
    metres, degrees = errors(estimate.c2w[0], truth)
    print(f"flow_pnp at {HEIGHT} x {WIDTH}: {1000 * metres:.1f} mm, {degrees:.3f} deg")
    assert metres < 0.02 and degrees < 0.3
    assert estimate.tracked.item() > 0.8 and estimate.residual.item() < 0.6
    assert torch.equal(estimate.c2w[0, 0], torch.eye(4))
    assert estimate.frame_indices.tolist() == list(range(FRAMES))
    assert estimate.diagnostics["lost_frames"].item() == 0


def test_metric_awareness(evaluate: FlowPnpEvaluator) -> None:
    """A camera that goes half as far is read as half as far: scale is not a free parameter."""
    whole, half = path(MOVE, (0, 0, 0)), path(tuple(m / 2 for m in MOVE), (0, 0, 0))  # type: ignore[arg-type]
    video = render(half)
    estimate = evaluate(video[None], clip(video[None])).c2w[0]
    length = math.dist(MOVE, (0, 0, 0))
    assert estimate[-1, :3, 3].norm().item() == pytest.approx(length / 2, abs=0.03)
    # Against the whole path the mean error is half the mean distance covered by then.
    expected = (whole[1:, :3, 3] - half[1:, :3, 3]).norm(dim=-1).mean().item()
    assert errors(estimate, whole)[0] == pytest.approx(expected, abs=0.03)


def test_pure_rotation_moves_nothing(evaluate: FlowPnpEvaluator) -> None:
    truth = path((0, 0, 0), (0, 8, 0))
    metres, degrees, tracked = score(evaluate, render(truth), truth)
    assert metres < 0.03 and degrees < 0.3 and tracked > 0.8


def test_moving_foreground_blur_and_noise(evaluate: FlowPnpEvaluator, honest: tuple[Tensor, Tensor]) -> None:
    truth, video = honest
    foreground = video.clone()
    patch = TEXTURES[WALL][0, :, 100:130, 200:230]
    for i in range(FRAMES):
        foreground[i, :, 40:70, 30 + 8 * i : 60 + 8 * i] = patch
    half = F.interpolate(F.avg_pool2d(video, 2), size=(HEIGHT, WIDTH), mode="bilinear")
    noisy = half + 4 / 127.5 * torch.randn(half.shape, generator=torch.Generator().manual_seed(0))
    for changed in (foreground, noisy.clamp(-1, 1)):
        metres, degrees, tracked = score(evaluate, changed, truth)
        assert metres < 0.05 and degrees < 0.6
        assert tracked > 0.5


def test_a_sharp_moving_object_does_not_take_all_corners() -> None:
    """A soft scene and one square of strong contrast that moves: judged frame-wide, its corners would be the only ones.

    The camera must be read about as well as without the square (a few centimetres of a path of metres).
    """
    world = WorldConfig(height=120, width=208, focal_px=130.0)
    pairs = paired_videos(world, 6, torch.Generator().manual_seed(5), paths="presets", style="real")
    patch = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7))
    patch = F.interpolate(patch[None], size=(30, 30), mode="bicubic")[0].clamp(-1, 1)
    video = pairs.truth.clone()
    for i in range(video.shape[1]):
        video[:, i, :, 60:90, 70 + 14 * i : 100 + 14 * i] = patch
    target = pairs.batch.target_camera
    evaluator = FlowPnpEvaluator()
    for shown in (pairs.truth, video):
        estimate = evaluator(shown, pairs.batch.source)
        apart = (estimate.c2w[:, 1:, :3, 3] - target.c2w[:, 1:, :3, 3]).norm(dim=-1)
        assert apart.median() < 0.1 and estimate.tracked.min() > 0.3
        walked = CameraTrajectory.build(estimate.c2w).path_length() / target.path_length().clamp_min(0.1)
        moving = target.path_length() > 1.0  # metres: a pan moves by less than the error
        assert ((walked - 1).abs()[moving] < 0.1).all()


def test_content_without_a_camera_is_not_tracked(evaluate: FlowPnpEvaluator, honest: tuple[Tensor, Tensor]) -> None:
    """Noise, black frames and a cut lose the track; a frozen video keeps it and is read as a camera that rests."""
    truth, video = honest
    noise = torch.rand(video.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    black = torch.full_like(video, -1.0)
    cut = torch.cat([video[:1], noise[1:]])
    for lost in (noise, black, cut):
        estimate = evaluate(lost[None], clip(lost[None]))
        assert estimate.tracked.item() < 0.1
        assert torch.isfinite(estimate.c2w).all()
    frozen = video[:1].expand(FRAMES, -1, -1, -1)
    still = evaluate(frozen[None], clip(frozen[None]))
    assert still.tracked.item() > 0.95
    assert still.c2w[0, :, :3, 3].norm(dim=-1).max() < 1e-3
    distance = truth[1:, :3, 3].norm(dim=-1).mean().item()
    assert errors(still.c2w[0], truth)[0] == pytest.approx(distance, abs=1e-3)


def test_clips_do_not_touch_each_other(evaluate: FlowPnpEvaluator, honest: tuple[Tensor, Tensor]) -> None:
    _, video = honest
    short = video[:3]
    broken = short.clone()
    broken[1, 0, 0, 0] = torch.nan
    both = torch.stack([short, broken])
    estimate = evaluate(both, clip(both))
    assert torch.equal(estimate.c2w[0], evaluate(short[None], clip(short[None])).c2w[0])
    assert torch.isnan(estimate.c2w[1]).all()


def test_a_video_without_a_number_in_it_is_no_content_failure(evaluate: FlowPnpEvaluator) -> None:
    """It is shown as black, whose camera is lost; but its poses are NaN: the sample is invalid, not lost."""
    video = torch.full((2, 3, 3, HEIGHT, WIDTH), torch.nan)
    video[1] = -1.0  # black: a video, of which nothing can be read
    target = CameraTrajectory.build(torch.eye(4).repeat(2, 3, 1, 1))
    output = GeometryReward(evaluate)(video, RetakeBatch(clip(video), target, ("", "")))
    assert output.valid.tolist() == [False, True] and output.lost.tolist() == [False, True]


def test_ground_plane_gives_depth() -> None:
    plane = torch.tensor([FLOOR, WALL])
    source = clip(torch.zeros(2, 2, 3, HEIGHT, WIDTH), plane)
    depth = plane_depth(source, HEIGHT, WIDTH)
    assert torch.isnan(depth[0, : HEIGHT // 2]).all()  # above the horizon
    torch.testing.assert_close(depth[1], torch.full((HEIGHT, WIDTH), 5.0))
    exact = cast(torch.eye(4))[1]
    floor = depth[0] < 4.5
    # The ray caster averages 4 rays per pixel of a hyperbola; the difference is second order in the pixel's height.
    torch.testing.assert_close(depth[0][floor], exact[floor], rtol=2e-3, atol=0)
    with pytest.raises(UsageError, match="ground plane"):
        plane_depth(clip(torch.zeros(1, 2, 3, 8, 8)), 8, 8)


def test_missing_opencv_and_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"min_points": 3}, {"max_corners": 20}):
        with pytest.raises(UsageError, match="min_points"):
            FlowPnpEvaluator(**settings)
    with pytest.raises(UsageError, match="at least 2 frames"):
        FlowPnpEvaluator()(torch.zeros(1, 1, 3, 8, 8), clip(torch.zeros(1, 1, 3, 8, 8)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RewardError, match="pip install opencv-python-headless"):
        FlowPnpEvaluator()
