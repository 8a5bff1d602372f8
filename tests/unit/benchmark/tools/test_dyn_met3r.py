"""The geometry of Dyn-MEt3R in float64 against closed forms: a plane seen by two cameras, discs, layers, holes."""

from __future__ import annotations

import io
import math

import exr
import numpy as np
import pytest
import torch
from torch import Tensor

from geoalign.benchmark.tools.answers import Scene
from geoalign.benchmark.tools.dyn_met3r import dyn_met3r, split_frames
from geoalign.benchmark.tools.splat import Disc, splat, unproject
from geoalign.benchmark.tools.worker import ToolFailure
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory

HEIGHT, WIDTH, DEPTH = 6, 10, 2.0
LENS = torch.tensor([1.3, 1.3 * WIDTH / HEIGHT, 0.45, 0.55], dtype=torch.float64)
PIXEL_M = DEPTH / (1.3 * WIDTH)
"""Metres on the plane from one pixel to the next: fx is 1.3 widths."""
TIGHT = {"rtol": 0.0, "atol": 1e-12}  # some tens of roundings of float64 of order one


def poses(shifts: list[float], turn: Tensor | None = None) -> Tensor:
    """Cameras ``[F, 4, 4]`` that look at the plane z = DEPTH, moved along x by whole or broken pixels."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(shifts), 1, 1)
    c2w[:, 0, 3] = PIXEL_M * torch.tensor(shifts, dtype=torch.float64)
    return c2w if turn is None else so3.compose(turn, c2w)


def plane(shifts: list[float]) -> Scene:
    """A wall that fills the view of cameras moved along it."""
    size = (len(shifts), HEIGHT, WIDTH)
    camera = CameraTrajectory.build(poses(shifts), LENS)
    return Scene(camera, torch.full(size, DEPTH), torch.zeros(size, dtype=torch.bool))


def painted(shifts: list[float]) -> np.ndarray:
    """Features ``[F, 2, H, W]`` painted on that wall: a direction that turns with the column and the row."""
    column = torch.arange(WIDTH)[None] + torch.tensor(shifts)[:, None]
    angle = 0.3 * column[:, None, :] + 0.2 * torch.arange(HEIGHT)[None, :, None]
    return torch.stack([angle.cos(), angle.sin()], 1).double().numpy()


def test_unprojection_is_the_inverse_of_projection() -> None:
    """Against the pinhole equation, from a turned camera; the corner and the centre of a pixel are half of it apart."""
    turn = so3.rigid(so3.exp(torch.tensor([0.3, -0.2, 0.1]).double()), torch.tensor([1.0, 2.0, 3.0]).double())
    depth = 1 + torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for centre in (0.0, 0.5):
        points = unproject(depth, turn, LENS, pixel_centre=centre).reshape(-1, 3)
        seen = torch.linalg.solve(turn[:3, :3], (points - turn[:3, 3]).T).T.reshape(HEIGHT, WIDTH, 3)
        torch.testing.assert_close(seen[..., 2], depth, **TIGHT)
        x = (seen[..., 0] / seen[..., 2] * LENS[0] + LENS[2]) * WIDTH
        y = (seen[..., 1] / seen[..., 2] * LENS[1] + LENS[3]) * HEIGHT
        torch.testing.assert_close(x, (torch.arange(WIDTH) + centre).double().expand(HEIGHT, WIDTH), **TIGHT)
        torch.testing.assert_close(y, (torch.arange(HEIGHT) + centre).double()[:, None].expand(HEIGHT, WIDTH), **TIGHT)


def test_a_plane_seen_by_two_cameras_overlaps_exactly() -> None:
    """Moved by three pixels, the second camera sees what the first saw three columns further right, and no more;
    turning the world about both changes nothing."""
    turn = so3.rigid(so3.exp(torch.tensor([0.4, 0.1, -0.3]).double()), torch.tensor([-2.0, 0.5, 1.0]).double())
    first, second = poses([0, 3], turn)
    features = torch.rand(HEIGHT, WIDTH, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = unproject(torch.full((HEIGHT, WIDTH), DEPTH, dtype=torch.float64), first, LENS)
    seen, covered = splat(points.reshape(-1, 3), features.reshape(-1, 4), second, LENS, (HEIGHT, WIDTH))
    expected = torch.arange(WIDTH)[None].expand(HEIGHT, WIDTH) < WIDTH - 3
    assert torch.equal(covered, expected)
    # Points lie on pixel centres up to rounding, which the disc squares.
    torch.testing.assert_close(seen[:, : WIDTH - 3], features[:, 3:], **TIGHT)
    assert not seen[:, WIDTH - 3 :].any()


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.4, 0.6, 0.8])
def test_a_disc_is_as_opaque_as_it_is_near_the_centre(offset: float) -> None:
    """One point, ``offset`` pixels right of a centre, drawn with a radius of 0.7 pixels: 1 - (d / r)^2 there and in the
    next pixel, whose centre is 1 - offset away, where that is positive."""
    x = (4.5 + offset) / WIDTH
    point = torch.tensor([[(x - 0.45) / 1.3 * DEPTH, (2.5 / HEIGHT - 0.55) / LENS[1].item() * DEPTH, DEPTH]]).double()
    disc = Disc(radius=0.7 * 2 / HEIGHT)
    seen, covered = splat(point.double(), torch.ones(1, 1), torch.eye(4), LENS, (HEIGHT, WIDTH), disc)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for column, distance in ((4, offset), (5, 1 - offset)):
        expected[2, column] = max(0.0, 1 - (distance / 0.7) ** 2)
    torch.testing.assert_close(seen[..., 0], expected, rtol=0, atol=1e-6)  # the point was made in float32
    assert torch.equal(covered, expected > 0)


def test_layers_blend_front_to_back_and_beyond_their_number_nothing() -> None:
    """Five points behind one pixel, given back to front, each with opacity a: the k-th nearest has a (1 - a)^k."""
    depth = torch.tensor([5.0, 3.0, 1.0, 4.0, 2.0], dtype=torch.float64)
    step = 0.5 * 2 / HEIGHT  # radius; the points lie half of it above the centre, so a = 1 - 1 / 4
    place = torch.tensor([3.5 / WIDTH - 0.45, (3.5 - 0.25) / HEIGHT - 0.55], dtype=torch.float64) / LENS[:2]
    points = torch.cat([depth[:, None] * place, depth[:, None]], 1)
    features = torch.eye(5, dtype=torch.float64)
    seen, _ = splat(points, features, torch.eye(4), LENS, (HEIGHT, WIDTH), Disc(radius=step, layers=3))
    expected = torch.tensor([0, 0.75 * 0.25**2, 0.75, 0, 0.75 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(seen[3, 3], expected, **TIGHT)


def drawn_one_by_one(points: Tensor, features: Tensor, c2w: Tensor, size: tuple[int, int], disc: Disc) -> Tensor:
    """The description word by word: for every pixel all points, sorted by depth, in Python."""
    picture = torch.zeros(*size, features.shape[1], dtype=torch.float64)
    w2c = torch.linalg.inv(c2w)
    for row in range(size[0]):
        for column in range(size[1]):
            hits = []
            for index, point in enumerate(points):
                x, y, z = (w2c[:3, :3] @ point + w2c[:3, 3]).tolist()
                if z <= 0:
                    continue
                across = (x / z * LENS[0].item() + LENS[2].item()) * size[1] - (column + 0.5)
                down = (y / z * LENS[1].item() + LENS[3].item()) * size[0] - (row + 0.5)
                far = (across**2 + down**2) / (min(size) / 2) ** 2
                if far < disc.radius**2:
                    hits.append((z, 1 - far / disc.radius**2, index))
            light = 1.0
            for _, opacity, index in sorted(hits)[: disc.layers]:
                picture[row, column] += light * opacity * features[index]
                light *= 1 - opacity
    return picture


def test_a_cloud_is_drawn_as_described() -> None:
    """Random points before and behind a turned camera, discs of 1.2 pixels and three layers, so that much overlaps."""
    generator = torch.Generator().manual_seed(4)
    points = 4 * torch.rand(90, 3, generator=generator, dtype=torch.float64) - torch.tensor([2.0, 2.0, 1.0])
    features = torch.randn(90, 3, generator=generator, dtype=torch.float64)
    turn = so3.rigid(so3.exp(torch.tensor([0.1, 0.2, -0.4]).double()), torch.tensor([0.1, -0.2, -0.3]).double())
    disc = Disc(radius=1.2 * 2 / HEIGHT, layers=3)
    seen, covered = splat(points, features, turn, LENS, (HEIGHT, WIDTH), disc)
    expected = drawn_one_by_one(points, features, turn, (HEIGHT, WIDTH), disc)
    torch.testing.assert_close(seen, expected, **TIGHT)
    assert torch.equal(covered, expected.any(-1)) and 0.2 < covered.float().mean() < 1


def test_points_behind_the_camera_or_without_a_place_are_not_drawn() -> None:
    points = torch.tensor([[0.0, 0.0, -2.0], [0.0, 0.0, 0.0], [torch.nan, 0.0, 1.0], [50.0, 0.0, 1.0]])
    seen, covered = splat(points, torch.ones(4, 1), torch.eye(4), LENS, (HEIGHT, WIDTH), Disc(radius=2.0))
    assert not covered.any() and not seen.any()


def test_the_score_of_a_wall_is_one_where_it_was_seen() -> None:
    """Frames 0, 2 and 4 become points, 1 and 3 are compared. A camera that moves by two pixels a frame sees everything
    before and after; one that jumps out of the picture sees only holes."""
    assert split_frames(5) == ([0, 2, 4], [1, 3]) and split_frames(4) == ([0, 1, 3], [2])
    shifts = [0.0, 2, 4, 6, 8]
    score = dyn_met3r(plane(shifts), painted(shifts), dtype=torch.float64)
    assert score.holes == 0 and score.score == pytest.approx(1, abs=1e-12)
    gone = [0.0, 2 * WIDTH, 0, 0, 0]  # frame 3 sees what frame 0 saw
    features = painted(gone)
    hole = torch.nn.functional.cosine_similarity(
        torch.from_numpy(features[1]).flatten(1).T, torch.full((1, 2), -1.0, dtype=torch.float64)
    )
    score = dyn_met3r(plane(gone), features, dtype=torch.float64)
    assert score.holes == 0.5 and score.score == pytest.approx((1 + float(hole.mean())) / 2, abs=1e-12)


def test_corners_for_centres_leave_a_resting_camera_without_a_picture() -> None:
    """What the published evaluation does: points half a pixel up and left, 0.71 pixels from any centre, while its discs
    reach 0.005 H / 2."""
    rest = [0.0] * 5
    score = dyn_met3r(plane(rest), painted(rest), pixel_centre=0.0, dtype=torch.float64)
    assert score.holes == 1
    assert dyn_met3r(plane(rest), painted(rest), dtype=torch.float64).holes == 0
    assert math.hypot(0.5, 0.5) > Disc().radius * 224 / 2 > 0.5  # at the published size too


def test_moving_pixels_are_neither_drawn_nor_compared() -> None:
    """A thing whose features mislead covers two columns of the wall in every frame; masked, it does no harm, and its
    place is a hole in frames that see behind it. A thing without a mask lowers the score."""
    shifts = [0.0, 2, 4, 6, 8]
    features, scene = painted(shifts), plane(shifts)
    features[:, :, :, 4:6] *= -1
    score = dyn_met3r(scene, features, dtype=torch.float64)
    assert score.score < 0.95
    moving = scene.moving.clone()
    moving[:, :, 4:6] = True
    masked = dyn_met3r(Scene(scene.camera, scene.depth, moving), features, dtype=torch.float64)
    # Frame 1 sees columns 2..11 of the wall, of which it masks 6 and 7; the points of frames 0, 2 and 4 lack 4 and 5, 8
    # and 9, 12 and 13, but each of them is in another frame. So nothing is a hole.
    assert masked.holes == 0 and masked.score == pytest.approx(1, abs=1e-12)
    with pytest.raises(ToolFailure, match="no pixel"):
        dyn_met3r(Scene(scene.camera, scene.depth, torch.ones_like(moving)), features)
    with pytest.raises(ToolFailure, match="needs three frames"):
        dyn_met3r(plane([0, 1]), painted([0, 1]))


def test_the_stand_in_for_depth_files_writes_real_ones() -> None:
    """FFmpeg decodes what the stand-in of ViPE writes (it knows the channel Y, not Z), and the reader reads it back."""
    import av

    pixels = np.linspace(0.5, 40, 12 * 16).reshape(12, 16).astype(np.float16)
    with av.open(io.BytesIO(exr.encode(pixels, "Y")), format="exr_pipe") as film:
        (frame,) = film.decode(video=0)
    kind = {"grayf16le": np.float16, "grayf32le": np.float32}[frame.format.name]  # the latter up to FFmpeg 7
    shown = np.frombuffer(bytes(frame.planes[0]), kind).reshape(12, -1)[:, :16]
    np.testing.assert_array_equal(shown.astype(np.float16), pixels)
    opened = exr.InputFile(io.BytesIO(exr.encode(pixels)))
    assert opened.channels(["Z"])[0] == pixels.tobytes() and opened.header()["dataWindow"].max.x == 15
