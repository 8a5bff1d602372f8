"""The embedded world: exact geometry, formats that the ordinary loaders read, a codec without seams."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seams import seam_ratio

from geoalign.config.data import DataConfig
from geoalign.config.world import WorldConfig
from geoalign.data.source import RetakeDataset
from geoalign.errors import DataError, UsageError
from geoalign.files.locks import writer_lock
from geoalign.geometry import so3
from geoalign.geometry.plane import ground_axes, intersect_plane, pixel_grid, pixel_rays
from geoalign.geometry.presets import preset
from geoalign.jobs.evaluate import psnr_db
from geoalign.models.codec import PatchCodec, lapped_transform
from geoalign.world.dataset import draw_clips, is_complete, write_world
from geoalign.world.motion import PRESETS, ground_normal, ground_plane, preset_motions, random_curves, to_c2w
from geoalign.world.pairs import LabelBias, paired_videos
from geoalign.world.render import intrinsics, render
from geoalign.world.scene import Scene, colour, sample_scenes
from geoalign.world.sheet import write_sheet

WORLD = WorldConfig(clips=12, trajectories=20)
CITY = WorldConfig(streets=True, frames=9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_motion_keeps_the_gimbal_level() -> None:
    """Pitch and roll never change: every rotation fixes the vertical; its angle is the yaw."""
    motion = random_curves(16, 5, generator())
    c2w = to_c2w(motion.double(), WORLD)
    normal = ground_normal(WORLD).double()
    assert torch.allclose(c2w[..., :3, :3] @ normal, normal.expand(16, 5, 3), atol=1e-7)  # float32 normal: 6e-8
    angle = so3.relative_angle(c2w[..., :3, :3], torch.eye(3, dtype=torch.float64).expand(16, 5, 3, 3))
    assert torch.allclose(angle, motion[..., 3].abs().double(), atol=1e-6)
    assert torch.equal(c2w[:, 0], torch.eye(4, dtype=torch.float64).expand(16, 4, 4))  # frame 0 is the source's frame 0


def test_presets_do_what_their_names_say() -> None:
    motion = preset_motions(len(PRESETS), 5, generator())
    end = dict(zip(PRESETS, motion[:, -1], strict=True))
    assert end["slide_right"][0] > 1 and end["slide_left"][0] < -1
    assert end["fly_forward"][1] < -1 and end["fly_backward"][1] > 1  # e2 points to the bottom of the picture
    assert end["descend"][2] > 1 and end["climb"][2] < -1
    assert end["sweep_right"][3] > 0.1 and end["sweep_left"][3] < -0.1
    for side, sign in (
        ("right", 1),
        ("left", -1),
    ):  # outward and backward, where the published arcs turn in and close in
        published = preset(f"arc_{side}", dtype=torch.float64).c2w[-1]
        assert sign * published[0, 3] > 1 and published[2, 3] > 0.5 and sign * published[0, 2] < -0.4
        arc = end[f"arc_back_{side}"]
        heading = -to_c2w(arc, WORLD)[:3, 1]  # what is up in the picture of a camera that looks down
        assert sign * arc[0] > 1 and sign * heading[0] > 0.1
        assert float(arc[1]) == pytest.approx(0.4 * (1 - math.cos(1.4)) * sign * float(arc[0]), rel=1e-5)
    # The point on the optical axis of the first view moves down the picture of a camera that flies forward.
    c2w = to_c2w(end["fly_forward"], WORLD)
    local = c2w[:3, :3].T @ (torch.tensor([0.0, 0.0, 10.0]) - c2w[:3, 3])
    assert local[1] / local[2] > 0.05


def test_the_bounds_of_random_curves_hold_anywhere_on_the_path_and_not_at_its_end() -> None:
    motion = random_curves(2000, 5, generator())
    distance, turn = motion[..., :3].norm(dim=-1), motion[..., 3].abs().amax(1)
    reach = distance.amax(1)
    assert float(reach.min()) == pytest.approx(0.6, rel=1e-5) and float(reach.max()) == pytest.approx(2.4, rel=1e-5)
    assert float(turn.max()) == pytest.approx(0.35, rel=1e-4) and math.degrees(0.35) < 20.1
    assert (distance[:, -1] < 0.59).any() and (distance[:, -1] < 0.99 * reach).any()


@pytest.mark.parametrize("streets", [False, True])
def test_render_is_the_map_seen_through_a_pinhole(streets: bool) -> None:
    """Independent derivation in float64: follow the ray of single pixels to the plane, then colour that point."""
    scene = sample_scenes(2, generator(), streets=streets)
    height = torch.tensor([9.0, 11.0])
    c2w = to_c2w(random_curves(2, 3, generator(1)), WORLD)
    plane = ground_plane(WORLD, height)
    video = render(scene, c2w, plane, WORLD)
    for b, f, row, column in ((0, 0, 0, 0), (0, 2, 47, 63), (1, 1, 20, 33)):
        direction = torch.tensor(
            [(column + 0.5 - 32) / WORLD.focal_px, (row + 0.5 - 24) / WORLD.focal_px, 1.0], dtype=torch.float64
        )
        pose = c2w[b, f].double()
        world_direction, origin = pose[:3, :3] @ direction, pose[:3, 3]
        normal = plane[b, :3].double()
        length = (plane[b, 3].double() - origin @ normal) / (world_direction @ normal)
        point = origin + length * world_direction
        ground = (ground_axes(plane[b : b + 1])[0, :2].double() @ point).float()
        expected = colour(scene[b : b + 1], ground[None, None])[0, 0]
        # float32 ground points are good to 1e-6 m; colour changes by at most about 3 per metre.
        assert torch.allclose(video[b, f, :, row, column], expected, atol=2e-5)


def test_far_rays_have_finite_gradients() -> None:
    """A camera that looks past the horizon gives clamped points, not infinities."""
    c2w = so3.exp(torch.tensor([1.5, 0.0, 0.0])).requires_grad_()
    pose = torch.eye(4).index_put((torch.arange(3)[:, None], torch.arange(3)), c2w)
    rays = pixel_rays(intrinsics(WORLD), pixel_grid(8, 8))
    points = intersect_plane(pose, rays, torch.tensor([0.0, 0.0, 1.0, 10.0]))
    points.square().mean().backward()
    assert torch.isfinite(points).all() and c2w.grad is not None and torch.isfinite(c2w.grad).all()


def test_streets_are_bright_straight_lines_between_blocks() -> None:
    """On a grid along the axes, streets every 8 and 7 metres from 1 and 2 on: bright where they cross, else a block."""
    scene = sample_scenes(1, generator(), style="real", streets=True)
    scene = replace(scene, streets=torch.tensor([[0.0, 1.0, 2.0, 8.0, 7.0]]))
    crossing, middle = torch.tensor([[[1.0, 2.0], [9.0, 9.0]]]), torch.tensor([[[5.0, 5.5], [13.0, 12.5]]])
    # In the middle of a street of 1.2 m with edges of 0.25 m its share is 1 / (1 + exp(-0.6 / 0.25)) = 0.917.
    assert (colour(scene, crossing) > 0.917 * 0.55 - (1 - 0.917)).all() and colour(scene, crossing).std() < 0.1
    assert torch.allclose(tone(scene, middle), 0.15 * tint(scene, middle), atol=2e-3)  # street: exp(-2.9 / 0.25)
    # A whole block has one tone: that of its middle.
    corner = middle + torch.tensor([1.5, -1.2])
    assert torch.allclose(tone(scene, corner), 0.15 * tint(scene, middle), atol=0.02)  # street: exp(-1.1 / 0.25)


def tone(scene: Scene, points: torch.Tensor) -> torch.Tensor:
    """What blocks add to a map of less contrast, ``[1, N, 1]``; equal for the three colours."""
    light = 0.1 * tint(scene, points)
    found = colour(scene, points) - 0.7 * (colour(replace(scene, streets=None), points) - light) - light
    return found.mean(-1, keepdim=True)


def tint(scene: Scene, points: torch.Tensor) -> torch.Tensor:
    """Light and dark from the definition: the sum of a scene's last three waves, ``[1, N, 1]``."""
    angle = points @ scene.wave[:, -3:].transpose(1, 2) + scene.phase[:, None, -3:]
    return (scene.amplitude[:, None, -3:] * angle.sin()).sum(-1, keepdim=True)


def test_label_bias_follows_its_law() -> None:
    """By hand: median exp(mean x growth) per frame and axis; logs spread by std x growth, alike in a whole clip."""
    bias = LabelBias(mean=(-0.3, 0.5, 0.0, 0.2), std=(0.2, 0.1, 0.0, 0.3), start=0.4, rise=0.8)
    logs = bias.draw(4000, 5, generator()).log()
    growth = torch.tensor([0.4, 0.6, 0.8, 1.0, 1.2])[:, None]
    # The error of a median of 4000: 1.25 x 0.36 / sqrt(4000) = 0.007.
    assert torch.allclose(logs.median(0).values, torch.tensor(bias.mean) * growth, atol=0.02)
    # A Gaussian clipped at 2 sigma has a standard deviation of 0.9594.
    assert torch.allclose(logs.std(0), 0.9594 * torch.tensor(bias.std) * growth, atol=0.015)
    level = logs / growth
    assert torch.allclose(level, level[:, :1].expand_as(level), atol=1e-6)
    assert torch.corrcoef(level[:, 0, [0, 1, 3]].T).fill_diagonal_(0).abs().max() < 0.06  # independent: 4 / sqrt(4000)


def test_label_bias_scales_the_true_motion_only() -> None:
    plain = paired_videos(WORLD, 6, generator(3))
    biased = paired_videos(WORLD, 6, generator(3), bias=LabelBias.translation(1.4))
    assert torch.equal(plain.batch.target_camera.c2w, biased.batch.target_camera.c2w)
    assert torch.equal(plain.truth[:, 0], biased.truth[:, 0]) and not torch.equal(plain.truth, biased.truth)
    assert torch.equal(plain.truth[:, 0], plain.batch.source.video[:, 0])  # frame 0 is given


class TestCodec:
    def test_lapped_transform_is_orthonormal_and_passes_constants(self) -> None:
        matrix = lapped_transform(64, 16)
        assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
        flat = (matrix @ torch.ones(64, dtype=torch.float64)).reshape(4, 16)
        assert (
            torch.allclose(flat[:, 0], torch.full((4,), 4.0, dtype=torch.float64)) and flat[:, 1:].abs().max() < 1e-12
        )

    def test_round_trip_error_is_the_dropped_energy(self) -> None:
        video = torch.randn(2, 3, 3, 48, 64, generator=generator(), dtype=torch.float64)
        codec = PatchCodec(16, 5, 3).double()
        latents = codec.encode(video)
        assert latents.shape == (2, *codec.latent_shape(3, 48, 64)) == (2, 43, 3, 3, 4)
        error = (codec.decode(latents) - video).square().sum()
        assert torch.isclose(error, video.square().sum() - latents.square().sum(), rtol=1e-12)
        assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-12)

    def test_complete_codec_loses_nothing(self) -> None:
        video = torch.randn(1, 1, 3, 16, 16, generator=generator(), dtype=torch.float64)
        codec = PatchCodec(8, 8, 8).double()
        assert torch.allclose(codec.decode(codec.encode(video)), video, atol=1e-12)

    def test_truncation_leaves_no_seams(self) -> None:
        """A plain patch DCT of the same size leaves twice the seams; the bound is the product's own (1.15)."""
        pairs = paired_videos(WORLD, 32, generator(), style="real")
        codec = PatchCodec(16, 5, 3).fit(pairs.truth)
        assert seam_ratio(codec.decode(codec.encode(pairs.truth)), 16) < 1.15
        pairs = paired_videos(CITY, 8, generator(), style="real")
        codec = PatchCodec(16, 7, 4).fit(pairs.truth)
        video = codec.decode(codec.encode(pairs.truth))
        assert seam_ratio(video, 16) < 1.15 and psnr_db(video, pairs.truth).mean() > 37  # what the demo's films need
        stripes = torch.zeros(1, 1, 3, 32, 32)
        stripes[..., 16:] = 1
        assert seam_ratio(stripes, 16) == float("inf")

    def test_wrong_sizes_are_refused(self) -> None:
        with pytest.raises(UsageError, match="multiple of the patch size"):
            PatchCodec(16).latent_shape(5, 50, 64)
        with pytest.raises(UsageError, match="at least one frame"):
            PatchCodec(16).latent_shape(0, 48, 64)
        with pytest.raises(UsageError, match="even patch"):
            PatchCodec(15)


class TestDataset:
    def data(self, root: Path) -> DataConfig:
        return DataConfig.model_validate(
            {
                "root": root,
                "num_frames": WORLD.frames,
                "height": WORLD.height,
                "width": WORLD.width,
                "clips": {"stride": 1, "caption": "verbatim"},
                "trajectories": {
                    "rescale": {
                        "play_fps": 12.0,
                        "translation": {"mean": 7.0, "std": 2.2, "low": 2.8, "high": 11.0},
                        "rotation": {"mean": 32.0, "std": 18.0, "low": 1.0, "high": 63.0},
                        "max_outlier_ratio": 30.0,
                    }
                },
            }
        )

    def test_ordinary_loaders_read_the_world_back(self, tmp_path: Path) -> None:
        data = self.data(tmp_path / "world")
        write_world(data, WORLD)
        assert is_complete(data, WORLD) and not is_complete(data, WORLD.model_copy(update={"seed": 1}))
        source = RetakeDataset(data, seed=0)
        batch = source.batch(0, [0, 1, 2])
        assert batch.source.video.shape == (3, 5, 3, 48, 64) and batch.source.ground_plane is not None
        assert torch.equal(batch.target_camera.c2w[:, 0], torch.eye(4).expand(3, 4, 4))
        # Camera and plane, which the loader read from files, are those of a level drone at a height of the settings ...
        c2w, plane = batch.source.camera.c2w, batch.source.ground_plane
        normal = ground_normal(WORLD)
        assert torch.allclose(c2w[..., :3, :3] @ normal, normal.expand(3, 5, 3), atol=1e-6)
        assert torch.allclose(plane[:, :3], normal.expand(3, 3), atol=1e-6)
        low, high = WORLD.height_m
        assert ((plane[:, 3] >= low) & (plane[:, 3] <= high)).all() and len(set(plane[:, 3].tolist())) == 3
        # ... and the pixels are what they see of each clip's own scene: half a grey level of rounding (lossless mp4).
        numbers = torch.tensor([int(name.split("_")[0].removeprefix("drone")) for name in batch.source.clip_ids])
        ((scenes, *_),) = draw_clips(WORLD)
        error = (batch.source.video - render(scenes[numbers], c2w, plane, WORLD)).abs().amax((1, 2, 3, 4))
        assert (error <= 1.01 / 255).all()
        others = (batch.source.video - render(scenes[numbers.roll(1)], c2w, plane, WORLD)).abs().amax((1, 2, 3, 4))
        assert len(set(numbers.tolist())) == 3 and (others > 0.2).all()

    def test_a_foreign_folder_is_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(DataError, match="not an embedded world"):
            write_world(self.data(tmp_path), WORLD)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_an_interrupted_write_starts_over(self, tmp_path: Path) -> None:
        data = self.data(tmp_path / "world")

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_world(data, WORLD, interrupt)
        assert not is_complete(data, WORLD)
        write_world(data, WORLD)
        assert json.loads((data.root / "world.json").read_text())["settings"]["clips"] == 12

    def test_a_render_killed_at_its_first_stamp_can_be_run_again(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        (left := tmp_path / ".geoalign-host-1-0.tmp").mkdir()
        (left / "new.tmp").touch()
        (tmp_path / ".lock").touch()
        write_world(data, WORLD)
        assert is_complete(data, WORLD)

    def test_what_a_kill_behind_the_last_file_leaves_goes_with_the_next_run(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        write_world(data, WORLD)
        before = contents(data.root)
        (tmp_path / ".writing").write_text((tmp_path / "world.json").read_text())
        (tmp_path / ".geoalign-elsewhere-1-1.tmp").mkdir()
        os.utime(tmp_path / ".geoalign-elsewhere-1-1.tmp", (0, 0))  # of a machine that was never heard of again
        write_world(data, WORLD, lambda _: pytest.fail("rendered again"))
        assert contents(data.root) == before and not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("damage", ["gone", "empty"])
    def test_files_that_are_gone_or_empty_are_rendered_again(self, damage: str, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        write_world(data, WORLD)
        before = contents(data.root)
        for file in (data.clips_path / "metadata.csv", sorted(data.root.rglob("*.mp4"))[3]):
            file.unlink()
            if damage == "empty":
                file.touch()
            assert not is_complete(data, WORLD)
            write_world(data, WORLD)
            assert is_complete(data, WORLD) and contents(data.root) == before

    def test_a_second_process_does_not_render_into_the_same_folder(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        with writer_lock(tmp_path, "world"), pytest.raises(UsageError, match="another process writes this world"):
            write_world(data, WORLD)
        assert not list(tmp_path.iterdir())

    def test_another_world_leaves_nothing_of_the_first(self, tmp_path: Path) -> None:
        """A smaller world over a larger one, finished or not, equals the smaller one alone, byte for byte."""
        large, small = WORLD, WORLD.model_copy(update={"clips": 3, "trajectories": 2, "frames": 4, "seed": 5})
        large = large.model_copy(update={"trajectories": 70})  # two archives
        alone, over = self.data(tmp_path / "alone"), self.data(tmp_path / "over")
        write_world(alone, small)
        write_world(over, large)

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_world(over, large.model_copy(update={"frames": 6}), interrupt)
        mine = over.clips_path / "files" / "drone00007" / "mine.mp4"
        mine.write_bytes(b"mine")
        write_world(over, small)
        assert mine.read_bytes() == b"mine"
        mine.unlink()
        mine.parent.rmdir()
        assert contents(over.root) == contents(alone.root)

    def test_a_world_that_lists_no_files_is_not_mixed_with_another(self, tmp_path: Path) -> None:
        (tmp_path / "world.json").write_text('{"fingerprint": "0"}')
        with pytest.raises(DataError, match="empty the folder"):
            write_world(self.data(tmp_path), WORLD)


def test_the_contact_sheet_labels_both_blocks(tmp_path: Path) -> None:
    write_sheet(WORLD, tmp_path / "sheet.png", rows=2)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    block = WORLD.frames * WORLD.width * 3
    assert pixels.shape == (24 + 2 * WORLD.height * 3, 2 * block + 12)
    assert pixels[:24, :block].min() < 64 and pixels[:24, block + 12 :].min() < 64  # something is written there
    assert pixels[:24, block : block + 12].min() == 255


def contents(root: Path) -> dict[str, bytes | None]:
    """Bytes of every file, None for folders, by relative name."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }
