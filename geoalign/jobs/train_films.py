"""Films while a run trains: source, retake, the paths asked for and read; as files, in TensorBoard, for the report.

What a film costs the loop is one copy of one decoded video to the host; scaling, drawing and writing are done by a
thread beside the next iteration. A film that cannot be written is said in the log and stops nothing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from geoalign.config.training import RunConfig
from geoalign.files.atomic import atomic_path, atomic_write_bytes
from geoalign.report.media import Array, scaled, thinned
from geoalign.report.run_folder import FILMS, film_iteration
from geoalign.training.trainer import TrainingFilm

logger = logging.getLogger(__name__)
_GIF_MS, _HOLD_MS = 160, 800
_PANEL = 120  # smallest height of a GIF in pixels: the path beside tiny frames must be legible
_ASKED, _READ = (40, 40, 40), (31, 111, 178)  # as in the report


class FilmWriter:
    """Writes ``films/iteration_NNNNNN.npz`` (for the report) and ``.gif`` (for everything else) of a run folder.

    At most ``run.keep_films`` films are kept: the first, the newest, and others as evenly spaced as can be. A resumed
    run deletes those at or after its first iteration, as it drops their metrics.

    Args:
        folder: of the run.
        run: how many films are wanted and kept.
        total: iterations of the run.
        first_iteration: where this part of the run begins, counted from 0.
    """

    def __init__(self, folder: Path, run: RunConfig, total: int, first_iteration: int = 0) -> None:
        self.folder, self._run, self._total = folder / FILMS, run, total
        for path in self.folder.glob("iteration_*"):
            if (number := film_iteration(path)) is not None and number >= first_iteration:
                path.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, "films")
        self._pending: list[tuple[int, Future[Path]]] = []

    def due(self, iteration: int) -> bool:
        """Whether the film of this iteration, counted from 0, is wanted: every so many, and the last one."""
        every = self._run.films_every
        return every > 0 and (iteration % every == 0 or self._is_last(iteration))

    def _is_last(self, iteration: int) -> bool:
        return iteration == self._total - 1

    def write(self, iteration: int, film: TrainingFilm) -> None:
        """Write the film of an iteration in the background."""
        self._pending.append((iteration, self._thread.submit(self._write, iteration, film)))

    def finished(self, wait: bool = False) -> Iterator[tuple[int, Path]]:
        """Iteration and GIF of films written since the last call, once each, of all films with ``wait``.

        Those who get them keep them for good, so they get fewer as a run grows long: all of the first ``keep_films``,
        half of the next as many, then a quarter of twice as many, and so on; and the last one.
        """
        while self._pending and (wait or self._pending[0][1].done()):
            iteration, future = self._pending.pop(0)
            try:
                gif = future.result()
                if self._passed_on(iteration):
                    yield iteration, gif
            except Exception as error:  # of whatever kind: a film is no reason to end a run
                logger.warning("the film of iteration %d was not written: %s", iteration, error)

    def _passed_on(self, iteration: int) -> bool:
        number = iteration // self._run.films_every
        stride = 1
        while number >= stride * self._run.keep_films:
            stride *= 2
        return self._is_last(iteration) or number % stride == 0

    def _write(self, iteration: int, film: TrainingFilm) -> Path:
        kept = thinned(film.source.shape[0])
        source, retake = (np.stack([scaled(frame) for frame in video[kept]]) for video in (film.source, film.retake))
        path = self.folder / f"iteration_{iteration:06d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"source": source, "retake": retake, "frames": kept + 1}
        arrays |= {"target_c2w": film.target_c2w[kept], "intrinsics": film.intrinsics[kept]}
        if film.ground_plane is not None:
            arrays["ground_plane"] = film.ground_plane
        read = None if film.read_c2w is None else film.read_c2w[kept]
        if read is not None:
            arrays["read_c2w"] = read
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        gif = path.with_suffix(".gif")
        atomic_write_bytes(gif, film_gif(source, retake, film.target_c2w[kept], read))
        self._thin()
        return gif

    def _thin(self) -> None:
        """Delete films until ``keep_films`` are left, each time the one whose neighbours are closest to each other."""
        found = (film_iteration(path) for path in self.folder.glob("iteration_*.npz"))
        numbers = sorted(number for number in found if number is not None)
        while len(numbers) > self._run.keep_films:
            inner = range(1, len(numbers) - 1) if len(numbers) > 2 else range(1)
            closest = min(inner, key=lambda i: numbers[min(i + 1, len(numbers) - 1)] - numbers[max(i - 1, 0)])
            number = numbers.pop(closest)
            for suffix in (".npz", ".gif"):
                (self.folder / f"iteration_{number:06d}{suffix}").unlink(missing_ok=True)

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)


def film_gif(source: Array, retake: Array, asked: Array, read: Array | None = None) -> bytes:
    """An endless GIF of uint8 ``[F, 3, H, W]`` videos side by side, with the paths drawn to their right.

    ``asked`` and ``read`` are ``[F, 4, 4]``, the latter NaN where nothing was read: black the path asked for, blue the
    camera read. OpenCV axes; the drawing shows the two axes in which the path asked for extends most.
    """
    factor = max(1, -(-_PANEL // source.shape[-2]))
    height, width = source.shape[-2] * factor, source.shape[-1] * factor
    paths = list(zip((_ASKED, _READ), _places(asked, read, height), strict=False))
    pictures = []
    for index in range(len(source)):
        canvas = Image.new("RGB", (2 * width + height + 8, height), "white")
        for left, frame in ((0, source[index]), (width + 4, retake[index])):
            picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, 0))
        draw = ImageDraw.Draw(canvas)
        for colour, places in paths:
            _draw_path(draw, places + np.array([2 * width + 8, 0]), index, colour)
        pictures.append(canvas.quantize(128, dither=Image.Dither.NONE))
    data = io.BytesIO()
    times = [_GIF_MS] * (len(pictures) - 1) + [_HOLD_MS]
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return data.getvalue()


def _draw_path(draw: ImageDraw.ImageDraw, places: Array, index: int, colour: tuple[int, int, int]) -> None:
    """The way up to frame ``index`` in colour, the rest pale, a dot at the frame; places that are NaN are left out."""
    known = np.isfinite(places.sum(axis=1))
    pale = tuple((2 * 255 + value) // 3 for value in colour)
    for upto, shade, thick in ((len(places), pale, 2), (index + 1, colour, 3)):
        draw.line([(float(x), float(y)) for x, y in places[:upto][known[:upto]]], fill=shade, width=thick)
    if known[index]:
        x, y = (float(value) for value in places[index])
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def _places(asked: Array, read: Array | None, size: int) -> list[Array]:
    """The paths ``[F, 2]`` in a square of ``size`` pixels: right is right; forward, or up where that is more, is up."""
    extent = np.ptp(asked[:, :3, 3], axis=0)
    rises = extent[1] > extent[2]
    flats = [
        np.stack([c2w[:, 0, 3], c2w[:, 1, 3] if rises else -c2w[:, 2, 3]], -1)
        for c2w in (asked, read)
        if c2w is not None
    ]
    every = np.concatenate(flats)
    low, high = np.nanmin(every, axis=0), np.nanmax(every, axis=0)
    scale = (size / 2 - 12) / max(float((high - low).max()) / 2, 1e-6)
    return [size / 2 + (flat - (low + high) / 2) * scale for flat in flats]
