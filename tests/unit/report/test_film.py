"""The film component as markup: what is embedded is what was given, without loss where it says so."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geoalign.report.document import document
from geoalign.report.film import CameraPath, Film, FrameNumbers, Ground, Take, film_html
from geoalign.report.media import MAX_FRAMES, MAX_WIDTH, sheet


def video(frames: int = 4, height: int = 12, width: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(frames).integers(0, 255, (frames, 3, height, width), np.uint8)


def facts(markup: str) -> dict[str, Any]:
    return json.loads(re.findall(r'<script type="application/json">(.*?)</script>', markup)[0])


def cells(markup: str) -> list[np.ndarray[Any, Any]]:
    """Frames [F, 3, H, W] of each embedded sheet, by the columns that the page states."""
    told = facts(markup)
    width, height, count = told["width"], told["height"], len(told["frames"])
    found = []
    for data in re.findall(r"base64,([^\"]+)", markup):
        picture = np.moveaxis(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")), -1, 0)
        corners = [(i // told["columns"] * height, i % told["columns"] * width) for i in range(count)]
        found.append(np.stack([picture[:, top : top + height, left : left + width] for top, left in corners]))
    return found


def test_small_frames_are_embedded_without_loss_whether_given_as_arrays_or_pictures() -> None:
    given = video()
    encoded = []
    for frame in given:
        data = io.BytesIO()
        Image.fromarray(np.moveaxis(frame, 0, -1)).save(data, format="PNG")
        encoded.append(data.getvalue())
    markup = film_html(Film("a", [Take("before", "Before", given), Take("after", "After", encoded)]))
    for found in cells(markup):
        assert np.array_equal(found, given)


def test_a_long_wide_film_is_thinned_and_scaled_and_its_numbers_with_it() -> None:
    count = 3 * MAX_FRAMES
    c2w = np.tile(np.eye(4), (count, 1, 1))
    c2w[:, 0, 3] = np.arange(count)
    film = Film(
        "long",
        [Take("truth", "Truth", np.broadcast_to(np.uint8(90), (count, 3, 96, 640)))],
        paths=[CameraPath("target", "asked", c2w)],
        ground=Ground(np.array([0, 0, 1, 9.0]), np.array([0.9, 1.2, 0.5, 0.5])),
        numbers=[FrameNumbers("Error", "m", "truth", [float(i) if i else float("nan") for i in range(count)])],
    )
    markup = film_html(film)
    told = facts(markup)
    assert (told["width"], told["height"], told["given"]) == (MAX_WIDTH, 48, [640, 96, count])
    assert len(told["frames"]) == MAX_FRAMES and told["frames"][0] == "1" and told["frames"][-1] == str(count)
    places = [pose[0][3] for pose in told["paths"][0]["c2w"]]
    assert [int(frame) - 1 for frame in told["frames"]] == places == [0, *told["numbers"][0]["values"][1:]]
    assert told["numbers"][0]["values"][0] is None and len(told["ground"]["lens"]) == MAX_FRAMES
    # Lossy WebP stores limited-range luma: one code step is 255/219, rounding twice stays below 3 levels.
    assert np.abs(cells(markup)[0].astype(int) - 90).max() < 3
    assert sheet(film.takes[0].frames[:MAX_FRAMES]).columns == 6


@pytest.mark.parametrize(
    "film",
    [
        Film("none", []),
        Film("sizes", [Take("a", "A", video()), Take("b", "B", video(width=18))]),
        Film("poses", [Take("a", "A", video())], paths=[CameraPath("a", "A", np.tile(np.eye(4), (3, 1, 1)))]),
        Film("type", [Take("a", "A", video().astype(np.float32))]),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(film: Film) -> None:
    with pytest.raises(ValueError, match=r"film|frames"):
        film_html(film)


def test_words_cannot_become_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    markup = film_html(Film(evil, [Take("after", evil, video())], note=evil))
    assert "<img src=x" not in markup and markup.count("</script>") == 1
    assert facts(markup)["takes"][0]["label"] == evil


def test_style_and_script_stand_once_in_a_page_and_only_where_a_film_is() -> None:
    one = film_html(Film("a", [Take("after", "After", video())]))
    page, without = document("t", one + one), document("t", "<p>text</p>")
    assert page.count("const geoalignFilm") == page.count(".film { background") == 1
    assert "geoalignFilm" not in without and ".film-stage" not in without
    assert page.index("Content-Security-Policy") < page.index("<style>")
