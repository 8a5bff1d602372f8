"""Films while a run trains: source, retake and the path asked for, as files, in TensorBoard and for the report.

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


class FilmWriter:
    """Writes ``films/iteration_NNNNNN.npz`` (for the report) and ``.gif`` (for everything else) of a run folder.

    At most ``run.keep_films`` films are kept: the first, the newest, and others as evenly spaced as can be. A resumed
    run deletes those at or after its first iteration, as it drops their metrics.
    """

    def __init__(self, folder: Path, run: RunConfig, first_iteration: int = 0) -> None:
        self.folder, self._run = folder / FILMS, run
        for path in self.folder.glob("iteration_*"):
            if (number := film_iteration(path)) is not None and number >= first_iteration:
                path.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, "films")
        self._pending: list[tuple[int, Future[Path]]] = []

    def due(self, iteration: int, total: int) -> bool:
        """Whether the film of this iteration, counted from 0, is wanted: every so many, and the last one."""
        every = self._run.films_every
        return every > 0 and (iteration % every == 0 or iteration == total - 1)

    def write(self, iteration: int, film: TrainingFilm) -> None:
        """Write the film of an iteration in the background."""
        self._pending.append((iteration, self._thread.submit(self._write, iteration, film)))

    def finished(self, wait: bool = False) -> Iterator[tuple[int, Path]]:
        """Iteration and GIF of the films written since the last call, once each; all of them with ``wait``."""
        while self._pending and (wait or self._pending[0][1].done()):
            iteration, future = self._pending.pop(0)
            try:
                yield iteration, future.result()
            except Exception as error:  # of whatever kind: a film is no reason to end a run
                logger.warning("the film of iteration %d was not written: %s", iteration, error)

    def _write(self, iteration: int, film: TrainingFilm) -> Path:
        kept = thinned(film.source.shape[0])
        source, retake = (np.stack([scaled(frame) for frame in video[kept]]) for video in (film.source, film.retake))
        path = self.folder / f"iteration_{iteration:06d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"source": source, "retake": retake, "frames": kept + 1}
        arrays |= {"target_c2w": film.target_c2w[kept], "intrinsics": film.intrinsics[kept]}
        if film.ground_plane is not None:
            arrays["ground_plane"] = film.ground_plane
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        gif = path.with_suffix(".gif")
        atomic_write_bytes(gif, film_gif(source, retake, film.target_c2w[kept, :3, 3]))
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


def film_gif(source: Array, retake: Array, position: Array) -> bytes:
    """An endless GIF of uint8 ``[F, 3, H, W]`` videos side by side, with the path asked for drawn to their right.

    ``position`` ``[F, 3]`` are the target's, OpenCV axes; the drawing shows the two axes in which it extends most.
    """
    factor = max(1, -(-_PANEL // source.shape[-2]))
    height, width = source.shape[-2] * factor, source.shape[-1] * factor
    places = _places(position, height)
    pictures = []
    for index in range(len(source)):
        canvas = Image.new("RGB", (2 * width + height + 8, height), "white")
        for left, frame in ((0, source[index]), (width + 4, retake[index])):
            picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, 0))
        draw = ImageDraw.Draw(canvas)
        path = [(2 * width + 8 + x, y) for x, y in places]
        draw.line(path, fill=(150, 150, 150), width=2)
        draw.line(path[: index + 1], fill=(31, 111, 178), width=3)
        x, y = path[index]
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(31, 111, 178))
        pictures.append(canvas.quantize(128, dither=Image.Dither.NONE))
    data = io.BytesIO()
    times = [_GIF_MS] * (len(pictures) - 1) + [_HOLD_MS]
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return data.getvalue()


def _places(position: Array, size: int) -> list[tuple[float, float]]:
    """The path in a square of ``size`` pixels: right to the right, and forward, or up where that is more, upwards."""
    extent = np.ptp(position, axis=0)
    up = position[:, 2] if extent[2] >= extent[1] else -position[:, 1]
    flat = np.stack([position[:, 0], -up], -1)
    middle = (flat.max(0) + flat.min(0)) / 2
    scale = (size / 2 - 12) / max(float(np.ptp(flat, axis=0).max()) / 2, 1e-6)
    return [(float(size / 2 + x), float(size / 2 + y)) for x, y in (flat - middle) * scale]
