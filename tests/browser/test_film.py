"""The film component in a real browser: play, drag, switch, difference and lines change what is on the screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from geoalign.report.document import document
from geoalign.report.film import CameraPath, Film, FrameNumbers, Ground, Take, film_html

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

FRAMES, HEIGHT, WIDTH = 5, 12, 16
LENS = np.array([0.9, 1.2, 0.5, 0.5])
HEIGHT_M = 10.0
STEPS = {"target": 0.5, "source": 0.0, "before": 0.7, "after": 0.6}


def straight(step: float) -> np.ndarray[Any, Any]:
    """A path to the right by ``step`` metres a frame that looks straight down at the ground."""
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))
    c2w[:, 0, 3] = step * np.arange(FRAMES)
    return c2w


def takes() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        role: rng.integers(0, 200, (FRAMES, 3, HEIGHT, WIDTH), np.uint8)
        for role in ("source", "before", "after", "truth")
    }


def page(count: int = 1) -> str:
    film = Film(
        "slide right",
        [Take(role, role.title(), frames) for role, frames in takes().items()],
        paths=[CameraPath(role, role, straight(step)) for role, step in STEPS.items()],
        ground=Ground(np.array([0, 0, 1, HEIGHT_M]), LENS),
        numbers=[FrameNumbers("Error", "m", "after", [0.1 * i for i in range(FRAMES)])],
    )
    return document("film", "<main>" + film_html(film) * count + "</main>")


def shown(tab: Page, selector: str = ".film-view .frame") -> np.ndarray[Any, Any]:
    """The pixels of a canvas, [H, W, 4]."""
    tab.wait_for_selector("article.film.live")
    uri = tab.evaluate(f"document.querySelector({selector!r}).toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def choose(tab: Page, label: str, option: str) -> None:
    tab.get_by_label(label).select_option(label=option)


def frame_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.moveaxis(array, 0, -1)


def test_takes_are_switched_in_place_and_shown_as_they_were_given(open_page: Callable[..., Page]) -> None:
    tab = open_page(page())
    tab.wait_for_selector("article.film.live")
    choose(tab, "Enlarged", "as pixels")
    videos = takes()
    for role in ("before", "truth", "after", "source"):
        tab.get_by_role("button", name=role.title(), exact=True).first.click()
        assert np.array_equal(shown(tab)[..., :3], frame_of(videos[role][-1])), role
    assert "16 × 12 pixels" in tab.inner_text(".film-said")  # noqa: RUF001
    choose(tab, "Difference", "to Truth")
    apart = np.abs(videos["source"][-1].astype(int) - videos["truth"][-1])
    assert np.array_equal(shown(tab)[..., :3], frame_of(np.minimum(4 * apart, 255)))
    psnr = 10 * np.log10(255**2 / np.mean(apart.astype(float) ** 2))
    assert f"PSNR {psnr:.1f} dB" in tab.inner_text(".film-said")
    choose(tab, "Difference", "off")
    choose(tab, "Enlarged", "bicubic")
    factor = shown(tab).shape[1] // WIDTH
    assert f"enlarged {factor} times by a bicubic filter" in tab.inner_text(".film-said")
    # Catmull-Rom has weights that sum to one and interpolates: block means of the enlarged frame follow the frame.
    big = shown(tab)[..., :3].reshape(HEIGHT, factor, WIDTH, factor, 3).mean((1, 3))
    given = frame_of(videos["source"][-1]).astype(float)
    assert np.corrcoef(big.ravel(), given.ravel())[0, 1] > 0.95


def test_the_slider_and_play_move_the_frames_and_the_numbers(open_page: Callable[..., Page]) -> None:
    from playwright.sync_api import expect

    tab = open_page(page())
    tab.wait_for_selector("article.film.live")
    choose(tab, "Enlarged", "as pixels")
    tab.get_by_label("frame", exact=True).fill("1")
    assert np.array_equal(shown(tab)[..., :3], frame_of(takes()["after"][1]))
    assert tab.inner_text(".film-bar output") == "2 / 5" and "0.100" in tab.inner_text(".film-number .now")
    tab.get_by_label("play", exact=True).click()
    expect(tab.locator(".film-bar output")).to_have_text("5 / 5")
    expect(tab.locator(".film-bar output")).to_have_text("1 / 5")  # it loops
    tab.get_by_label("pause", exact=True).click()
    still = tab.inner_text(".film-bar output")
    tab.wait_for_timeout(600)  # two frames at 4 a second
    assert tab.inner_text(".film-bar output") == still


def test_ground_lines_lie_where_the_camera_sees_them(open_page: Callable[..., Page]) -> None:
    """Straight down from 10 m with fx 0.9: a line at x metres stands at 0.9 (x - t) / 10 + 0.5 of the width."""
    tab = open_page(page())
    tab.wait_for_selector("article.film.live")
    assert not shown(tab, ".film-view .lines")[..., 3].any()
    for choice, travelled in (("as asked for", 0.5 * 4), ("of this take", 0.6 * 4)):
        choose(tab, "Ground lines", choice)
        found = shown(tab, ".film-view .lines")
        assert "every 2 m" in tab.inner_text(".film-said")
        row = found[found.shape[0] * 3 // 7, :, 3].astype(int)  # between two horizontal lines
        peaks = np.flatnonzero((row > 100) & (row >= np.roll(row, 1)) & (row > np.roll(row, -1)))
        expected = (0.9 * (np.arange(-12, 14, 2) - travelled) / HEIGHT_M + 0.5) * found.shape[1]
        expected = expected[(expected > 4) & (expected < found.shape[1] - 4)]
        assert len(expected) >= 5
        assert all(np.abs(peaks - place).min() <= 2 for place in expected)  # a line is 1 to 3 pixels wide
    tab.get_by_role("button", name="Source", exact=True).first.click()
    assert not np.array_equal(shown(tab, ".film-view .lines"), found)


@pytest.mark.parametrize("touch", [False, True])
def test_the_paths_are_turned_by_hand_and_hidden_by_the_legend(open_page: Callable[..., Page], touch: bool) -> None:
    tab = open_page(page(), width=390 if touch else 1200, has_touch=touch)
    before = shown(tab, ".orbit")
    box = tab.locator(".orbit").bounding_box()
    assert box
    tab.locator(".orbit").scroll_into_view_if_needed()
    box = tab.locator(".orbit").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if touch:
        client = tab.context.new_cdp_session(tab)
        for kind, at in (("touchStart", 0), ("touchMove", 40), ("touchMove", 80), ("touchEnd", None)):
            points = [] if at is None else [{"x": x + at, "y": y}]
            client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    else:
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + 60, y + 20, steps=3)
        tab.mouse.up()
    turned = shown(tab, ".orbit")
    assert not np.array_equal(turned, before)
    tab.mouse.move(x - 50, y)  # the button is up: nothing turns any more
    assert np.array_equal(shown(tab, ".orbit"), turned)
    tab.locator(".film-legend button").first.click()
    assert not np.array_equal(shown(tab, ".orbit"), turned)
    tab.get_by_role("button", name="above", exact=True).click()
    assert not np.array_equal(shown(tab, ".orbit"), turned)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page: Callable[..., Page]) -> None:
    from playwright.sync_api import expect

    tab = open_page(page(2), width=390, height=800, device_scale_factor=2)
    expect(tab.locator("article.film.live")).to_have_count(2)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    narrow = tab.evaluate(
        "[...document.querySelectorAll('.film button, .film select, .film input, .film canvas')]"
        ".filter(e => e.getBoundingClientRect().right > 390 || e.getBoundingClientRect().width < 24).length"
    )
    assert narrow == 0


def test_without_scripts_the_takes_remain_as_strips(open_page: Callable[..., Page]) -> None:
    tab = open_page(page(), java_script_enabled=False)
    assert tab.locator(".film-strips img").count() == 4 and tab.locator(".film-strips img").first.is_visible()
    assert not tab.locator(".film-stage").is_visible()
