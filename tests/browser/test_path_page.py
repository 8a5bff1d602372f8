"""A path drawn in the page, saved by its script, is the path that the project's own door opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from geoalign.geometry.cameras.door import open_camera, open_target
from geoalign.geometry.presets import preset
from geoalign.report.path_page import PathDrawing, SpeedBand, path_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

FRAMES, SIZE, LENS = 17, (96, 128), (0.8, 1.1, 0.5, 0.48)
PLANE = np.array([0.0, 0.6, 0.8, 9.0])


def spin(degrees: float) -> np.ndarray:
    """Poses that turn to the right on the spot."""
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))
    for frame, angle in enumerate(np.radians(np.linspace(0, degrees, FRAMES))):
        c2w[frame, :3:2, :3:2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return c2w


def turned(tab: Page) -> float:
    """Degrees by which the drawn camera turns from frame to frame, all together."""
    ahead = np.array(tab.evaluate("geoalignPath.poses()"))[:, :3, 2]
    return float(np.degrees(np.arccos(np.clip((ahead[1:] * ahead[:-1]).sum(-1), -1, 1))).sum())


def page() -> str:
    names = ("arc_right", "tilt_up")
    presets = {name: preset(name, FRAMES, dtype=torch.float64).c2w.numpy() for name in names}
    return path_page(
        PathDrawing(
            name="my clip.mp4",
            video=np.random.default_rng(0).integers(0, 255, (FRAMES, 3, 24, 32), np.uint8),
            size=SIZE,
            intrinsics=np.array(LENS),
            plane=PLANE,
            presets=presets | {"spin": spin(270)},
            fps=16.0,
            metres_per_s=SpeedBand(1.0, 0.2, 1.6),
            degrees_per_s=SpeedBand(12.0, 2.0, 30.0),
            most_path_m=6.0,
            most_yaw_deg=75.0,
        )
    )


def saved(tab: Page, folder: Path) -> Path:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save path").click()
    assert download.value.suggested_filename == "my_clip_path.npz"
    path = folder / "saved.npz"
    download.value.save_as(path)
    return path


def test_what_is_drawn_is_what_the_door_opens(open_page: Callable[..., Page], tmp_path: Path) -> None:
    tab = open_page(page())
    tab.locator("article.film.live").wait_for()
    tab.get_by_label("right", exact=True).fill("2")
    tab.get_by_label("up", exact=True).fill("0.5")
    tab.get_by_label("forward", exact=True).fill("1")
    tab.get_by_label("turned right", exact=True).fill("30")
    tab.get_by_label("tilted up", exact=True).fill("10")
    tab.keyboard.press("Tab")
    tab.evaluate("scrollTo(0, 0)")  # the focus went to the film, further down
    start = tab.evaluate("geoalignPath.place(0, 4)")
    box = tab.locator("#top").bounding_box()
    assert box
    tab.mouse.move(box["x"] + start[0], box["y"] + start[1])
    tab.mouse.down()
    tab.mouse.move(box["x"] + start[0] - 40, box["y"] + start[1] - 20, steps=4)
    tab.mouse.up()
    drawn = np.array(tab.evaluate("geoalignPath.poses()"))
    found = open_camera(saved(tab, tmp_path))
    assert found.format == "geoalign npz" and found.metric and found.has_lens
    assert np.array_equal(found.path.c2w[:, :3, 3].numpy(), drawn[:, :, 3])
    # Rotations are projected onto SO(3) when a file is opened: a step of rounding.
    assert np.abs(found.path.c2w[:, :3, :3].numpy() - drawn[:, :, :3]).max() < 1e-12
    last = found.path.c2w[-1].numpy()
    assert last[0, 3] < 2 and last[2, 3] > 1 and last[1, 3] == -0.5  # dragged left and ahead; up is minus y
    yaw, pitch = np.radians(30), np.radians(10)
    ahead = [np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)]
    assert np.allclose(last[:3, 2], ahead, atol=1e-12) and np.allclose(last[:3, 0], [np.cos(yaw), 0, -np.sin(yaw)])
    assert np.allclose(found.path.intrinsics[0].numpy(), LENS) and found.ground_plane is not None
    assert np.allclose(found.ground_plane.numpy(), PLANE)
    target = open_target(tmp_path / "saved.npz", FRAMES)
    assert torch.equal(target.c2w[0], torch.eye(4)) and torch.allclose(target.c2w.double(), found.path.c2w, atol=1e-6)


def test_presets_are_followed_and_speeds_are_told_against_the_law(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    tab = open_page(page(), width=390, height=800)
    tab.locator("article.film.live").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.get_by_label("preset").select_option(label="arc right")
    truth = preset("arc_right", FRAMES, dtype=torch.float64).c2w.numpy()
    drawn = np.array(tab.evaluate("geoalignPath.poses()"))
    # Five points with cubic pieces between them: the preset's own speed profile is nearly even.
    assert np.abs(drawn[:, :, 3] - truth[:, :3, 3]).max() < 0.01 * np.abs(truth[:, :3, 3]).max() + 1e-3
    assert np.abs(drawn[[0, 4, 8, 12, 16], :, :3] - truth[[0, 4, 8, 12, 16], :3, :3]).max() < 1e-5
    peak = 16 * np.linalg.norm(np.diff(drawn[:, :, 3], axis=0), axis=1).max()
    assert f"peak {peak:.3g} m/s: inside the law" in tab.inner_text("#metres-said")
    tab.get_by_label("strength").fill("20")
    assert "faster than trained" in tab.inner_text("#metres-said")
    for view, name in enumerate(("top", "side")):  # the whole path stays in sight
        box = tab.locator(f"#{name}").bounding_box()
        assert box
        for point in range(5):
            x, y = tab.evaluate(f"geoalignPath.place({view}, {point})")
            assert 0 < x < box["width"] and 0 < y < box["height"]
    assert np.abs(open_camera(saved(tab, tmp_path)).path.c2w[-1, :3, 3].numpy() - 20 * drawn[-1, :, 3]).max() < 1e-6
    tab.get_by_role("button", name="Undo").click()
    assert not np.array(tab.evaluate("geoalignPath.poses()"))[:, :, 3].any()


def test_a_camera_turned_past_half_a_circle_does_not_turn_back(open_page: Callable[..., Page], tmp_path: Path) -> None:
    tab = open_page(page())
    tab.locator("article.film.live").wait_for()
    tab.get_by_label("preset").select_option(label="spin")
    assert abs(turned(tab) - 270) < 1  # of one camera, all of it to the right
    tab.get_by_label("preset").select_option(label="none")
    tab.get_by_label("right", exact=True).fill("2")
    tab.get_by_label("turned right", exact=True).fill("170")
    tab.keyboard.press("Tab")
    tab.evaluate("scrollTo(0, 0)")
    box, at = tab.locator("#top").bounding_box(), tab.evaluate("geoalignPath.place(0, 4)")
    assert box

    def to(degrees: float) -> None:  # the handle stands 38 pixels from its point
        angle = np.radians(degrees)
        tab.mouse.move(box["x"] + at[0] + 38 * np.sin(angle), box["y"] + at[1] - 38 * np.cos(angle))

    to(170)
    tab.mouse.down()
    for degrees in range(172, 192, 2):
        to(degrees)
    tab.mouse.up()
    assert abs(tab.evaluate("geoalignPath.points()[4].yaw") - 190) < 3  # a pixel is 1.5 degrees
    # 190 degrees to the right, and the little to the left with which a smooth curve takes a run-up.
    assert 187 < turned(tab) < 240
    last = open_camera(saved(tab, tmp_path)).path.c2w[-1, :3, 2].numpy()
    assert abs(np.degrees(np.arctan2(last[0], last[2])) + 170) < 3
