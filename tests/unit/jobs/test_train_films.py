"""Films of a run in progress: files, TensorBoard and the report hold what was filmed, and the disk stays bounded."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geoalign.config.training import RunConfig
from geoalign.errors import DataError
from geoalign.files.arrays import read_arrays
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.metrics_file import MetricsWriter
from geoalign.jobs.train_films import FilmWriter
from geoalign.report.page import report_page
from geoalign.report.run_folder import read_films, read_run
from geoalign.training.film import TrainingFilm
from geoalign.types import RetakeBatch, SourceClip

FRAMES = 5


def film(level: int, frames: int = FRAMES, height: int = 12, width: int = 16) -> TrainingFilm:
    c2w = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    c2w[:, 2, 3] = np.arange(frames)
    video = np.full((frames, 3, height, width), level, np.uint8)
    lens = np.tile(np.array([0.9, 1.2, 0.5, 0.5], np.float32), (frames, 1))
    read = c2w.copy()
    read[:, 0, 3], read[-1] = np.arange(frames), np.nan
    return TrainingFilm(video, 255 - video, c2w, lens, np.array([0, 1, 0, 2], np.float32), read)


def write(folder: Path, run: RunConfig, films: dict[int, TrainingFilm], total: int = 1000) -> list[tuple[int, Path]]:
    with FilmWriter(folder, run, total) as writer:
        for iteration, item in films.items():
            writer.write(iteration, item)
        return list(writer.finished(wait=True))


def test_films_are_due_every_so_many_iterations_and_at_the_end(tmp_path: Path) -> None:
    writer = FilmWriter(tmp_path, RunConfig(films_every=4), 11)
    assert [i for i in range(11) if writer.due(i)] == [0, 4, 8, 10]
    assert not any(FilmWriter(tmp_path, RunConfig(films_every=0), 11).due(i) for i in range(11))


def test_the_first_the_newest_and_evenly_spaced_films_are_kept(tmp_path: Path) -> None:
    write(tmp_path, RunConfig(keep_films=5), {i: film(i) for i in range(0, 90, 10)})
    kept = sorted(int(path.stem[-6:]) for path in (tmp_path / "films").glob("*.npz"))
    assert kept[0] == 0 and kept[-1] == 80 and len(kept) == 5
    assert max(np.diff(kept)) <= 30  # evenly would be 20; films that are gone cannot come back
    assert sorted(int(path.stem[-6:]) for path in (tmp_path / "films").glob("*.gif")) == kept


def test_a_resumed_run_has_no_films_of_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, RunConfig(), {i: film(i) for i in (0, 10, 20)})
    strange = [tmp_path / "films" / name for name in ("iteration_best.npz", "iteration_000020 copy.npz", "notes.txt")]
    for file in strange:
        file.write_text("mine")
    with FilmWriter(tmp_path, RunConfig(keep_films=2), 20, 11) as writer:
        writer.write(12, film(12))
    kept = {path.name for path in (tmp_path / "films").iterdir()}
    assert kept == {file.name for file in strange} | {
        f"iteration_{i:06d}.{kind}" for i in (0, 12) for kind in ("npz", "gif")
    }
    assert [clip.iteration for clip in read_films(tmp_path / "films")] == [0, 12]


def test_those_who_keep_every_film_get_few_of_a_long_run(tmp_path: Path) -> None:
    run = RunConfig(films_every=10, keep_films=4)
    films = {i: film(9, frames=2) for i in [*range(0, 400, 10), 399]}
    got = [iteration for iteration, _ in write(tmp_path, run, films, 400)]
    # 4 of the first 4 films, 2 of the next 4, 2 of the next 8, 2 of the next 16, the first of those behind, the last.
    assert got == [0, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 399]


@pytest.mark.parametrize("total", [1, 201, 209, 210, 211, 231, 421])
def test_the_last_film_reaches_them_wherever_it_falls(total: int, tmp_path: Path) -> None:
    run = RunConfig(films_every=10, keep_films=20)
    last = {total - 1: film(9, frames=2)}
    assert FilmWriter(tmp_path, run, total).due(total - 1)
    assert [iteration for iteration, _ in write(tmp_path, run, last, total)] == [total - 1]
    in_between = write(tmp_path, run, {410: film(9, frames=2)}, 500)  # neither last nor of the wider stride
    assert in_between == []


def test_a_film_shows_source_retake_and_paths(tmp_path: Path) -> None:
    ((iteration, gif),) = write(tmp_path, RunConfig(), {7: film(200)})
    picture = Image.open(gif)
    assert iteration == 7 and picture.n_frames == FRAMES and picture.info["loop"] == 0
    seen = []
    for index in range(FRAMES):
        picture.seek(index)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        factor = pixels.shape[0] // 12
        assert (pixels[:, : 16 * factor] == 200).all() and (pixels[:, 16 * factor + 4 : 32 * factor + 4] == 55).all()
        seen.append(pixels[:, 32 * factor + 8 :])
    # The black dot goes forward, which is upwards in the drawing, the blue one to the right as well, until it is lost.
    dots = [np.argwhere((part < 80).all(-1)) for part in seen[1:]]  # at the start the blue one covers it
    assert all(np.diff([places[:, 0].min() for places in dots]) < 0)
    assert len({places[:, 1].max() for places in dots}) == 1
    read = [np.argwhere((part[..., 2] > 150) & (part[..., 0] < 80)) for part in seen]
    assert all(np.diff([places[:, 1].max() for places in read[:-1]]) > 0)
    assert read[-1][:, 1].max() < read[-2][:, 1].max()  # a line, and no dot at its end
    (clip,) = read_films(tmp_path / "films")
    assert clip.iteration == 7 and (clip.retake == 55).all() and clip.ground_plane is not None
    assert np.array_equal(clip.target_c2w[:, 2, 3], np.arange(FRAMES))
    assert np.array_equal(clip.read_c2w[:-1, 0, 3], np.arange(FRAMES - 1)) and np.isnan(clip.read_c2w[-1]).all()


def test_a_large_film_is_bounded(tmp_path: Path) -> None:
    write(tmp_path, RunConfig(), {0: film(9, frames=81, height=96, width=640)})
    (clip,) = read_films(tmp_path / "films")
    assert clip.source.shape == (33, 3, 48, 320) and clip.frames[[0, -1]].tolist() == [1, 81]
    assert np.array_equal(clip.target_c2w[:, 2, 3] + 1, clip.frames)


def test_tensorboard_gets_the_moving_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    run = RunConfig()
    written = write(tmp_path, run, {3: film(100)})
    with MetricsWriter(tmp_path, run) as metrics:
        metrics.add_films([*written, (4, tmp_path / "films" / "thinned.gif")])
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={IMAGES: 0}).Reload()
    (image,) = events.Images("film")
    assert image.step == 3 and image.encoded_image_string == written[0][1].read_bytes()
    assert Image.open(io.BytesIO(image.encoded_image_string)).n_frames == FRAMES


def test_a_film_that_is_thinned_out_meanwhile_ends_neither_run_nor_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    run = RunConfig()
    written = dict(write(tmp_path, run, {i: film(100 + i) for i in (3, 4, 5)}))
    whole, opened = written[3].read_bytes(), Image.open

    def thin_then_open(file: Any) -> Image.Image:
        written[3].unlink(missing_ok=True)
        return opened(file)

    monkeypatch.setattr("geoalign.jobs.metrics_file.Image.open", thin_then_open)
    with MetricsWriter(tmp_path, run) as metrics:
        metrics.add_films([(3, written[3]), (9, tmp_path / "films" / "gone.gif"), (4, written[4])])
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={IMAGES: 0}).Reload()
    assert [image.step for image in events.Images("film")] == [3, 4]
    assert events.Images("film")[0].encoded_image_string == whole

    def thin_then_read(path: Path, *rest: Any, **named: Any) -> Any:
        if path.name == "iteration_000004.npz":
            path.unlink()
        return read_arrays(path, *rest, **named)

    monkeypatch.setattr("geoalign.report.run_folder.read_arrays", thin_then_read)
    assert [clip.iteration for clip in read_films(tmp_path / "films")] == [3, 5]
    (tmp_path / "films" / "iteration_000005.npz").write_bytes(b"PK")  # damaged, which is said
    with pytest.raises(DataError, match="iteration_000005"):
        read_films(tmp_path / "films")


def test_wandb_gets_the_file(tmp_path: Path) -> None:
    saved: list[tuple[str, dict[str, Any]]] = []

    class Tracker:
        def save(self, path: str, **options: Any) -> None:
            saved.append((path, options))

        def finish(self, exit_code: int) -> None:
            pass

    with MetricsWriter(tmp_path, RunConfig()) as metrics:
        metrics._tracker = Tracker()
        metrics.add_films(write(tmp_path, RunConfig(), {3: film(100)}))
    assert saved == [(str(tmp_path / "films" / "iteration_000003.gif"), {"base_path": str(tmp_path), "policy": "now"})]


def test_a_film_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "films").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path, RunConfig(), {3: film(100)}) == []
    assert "film of iteration 3" in caplog.text


def test_the_report_shows_them_in_order(tmp_path: Path) -> None:
    write(tmp_path, RunConfig(), {i: film(i) for i in range(0, 100, 10)})
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "reward/trans_m": 1.0}\n')
    page = report_page(read_run(tmp_path))
    assert re.findall(r"<summary>Iteration (\d+)", page) == ["0", "20", "40", "50", "70", "90"]


def test_what_is_filmed_is_the_first_sample_with_its_request() -> None:
    video = torch.linspace(-1, 1, 2 * 3 * 3 * 4 * 4).reshape(2, 3, 3, 4, 4)
    lens = (0.9, 1.2, 0.5, 0.5)
    target = CameraTrajectory.build(torch.eye(4).repeat(2, 3, 1, 1), lens).scale_translation(1.0)
    source = SourceClip(video, CameraTrajectory.build(torch.eye(4).repeat(2, 3, 1, 1)), None, ("a", "b"))
    filmed = TrainingFilm.of(RetakeBatch(source, target, ("", "")), -video)
    assert np.array_equal(filmed.source, ((video[0] + 1) * 127.5).round().to(torch.uint8).numpy())
    assert filmed.retake.shape == (3, 3, 4, 4) and filmed.ground_plane is None
    assert np.allclose(filmed.intrinsics[0], lens)
    assert filmed.with_camera(None).read_c2w is None
    camera = torch.eye(4).repeat(3, 1, 1)
    camera[:, 0, 3] = torch.arange(3)
    assert np.array_equal(filmed.with_camera(camera).read_c2w, camera)  # its target begins at the identity
