"""``geoalign score`` on files: a bad one costs its own row, wrong requests are explained before anything is built."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camera_files import write_c2w
from PIL import Image

from geoalign.cli.main import main
from geoalign.cli.score import _print_table
from geoalign.config.world import WorldConfig
from geoalign.data.plots import cameras_figure
from geoalign.data.video import write_video
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.metrics import CAMERA_METRICS
from geoalign.rewards import registry
from geoalign.rewards.base import RewardOutput
from geoalign.types import RetakeBatch
from geoalign.world.pairs import paired_videos


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A true retake of 5 frames, its source and path; a folder with two good videos and one cut in half."""
    world = WorldConfig()
    pairs = paired_videos(world, 1, torch.Generator().manual_seed(4), style="real")
    names = ("retake.mp4", "source.mp4", "source.npz", "bare.npz", "short.npz", "target.json", "target4.json")
    paths = {name: tmp_path / name for name in names}
    write_video(paths["retake.mp4"], pairs.truth[0], 12, lossless=True)
    write_video(paths["source.mp4"], pairs.batch.source.video[0], 12, lossless=True)
    plane = pairs.batch.source.ground_plane
    assert plane is not None
    camera, target, size = pairs.batch.source.camera[0], pairs.batch.target_camera[0], (world.height, world.width)
    write_clip_camera(paths["source.npz"], camera, size, ground_plane=plane[0])
    write_clip_camera(paths["bare.npz"], camera, size)
    write_clip_camera(paths["short.npz"], camera.frames([0, 1]), size, ground_plane=plane[0])
    write_c2w(paths["target.json"], target)
    write_c2w(paths["target4.json"], target.frames([0, 1, 2, 3]))
    paths["folder"] = tmp_path / "folder"
    paths["folder"].mkdir()
    for name in ("a.mov", "a.mp4"):
        shutil.copy(paths["retake.mp4"], paths["folder"] / name)
    paths["broken"] = paths["folder"] / "c.mp4"
    paths["broken"].write_bytes(paths["retake.mp4"].read_bytes()[:200])
    return paths


@pytest.fixture
def score(files: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Score with the source given; returns the exit code and the rows of the JSON."""

    def run(*arguments: str, video: str = "retake.mp4", target: str = "target.json") -> tuple[int, list[dict]]:
        words = ["--video", str(files[video]), "--trajectory", str(files[target]), "--json", str(tmp_path / "s.json")]
        words += ["--source", str(files["source.mp4"]), "--source-camera", str(files["source.npz"])]
        code = main(["score", *words, *arguments])
        return code, json.loads((tmp_path / "s.json").read_text())

    return run


def test_a_true_retake_scores_within_two_centimetres(score: Callable, files: dict[str, Path]) -> None:
    code, (row,) = score("--plot")
    assert code == 0 and row["valid"] and row["trans_m"] < 0.02 and row["rot_deg"] < 0.1
    assert (row["frames"], row["video_frames"]) == (5, 5) and "error" not in row
    with Image.open(files["retake.mp4"].with_name("retake.mp4.png")) as picture:
        assert picture.info["Software"] == "geoalign"


def test_a_row_has_every_camera_error(
    score: Callable, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A true retake judged against a path half as long: twice the motion in metres, of which TransErr sees nothing."""
    target = open_camera(files["target.json"]).path
    write_c2w(files["target.json"], target.scale_translation(0.5))
    code, (row,) = score()
    assert code == 0 and row.keys() >= set(CAMERA_METRICS)
    behind = 0.5 * target.position.norm(dim=-1)[1:].mean()
    assert row["translation_error_m"] == pytest.approx(float(behind), abs=0.02)
    assert row["scale_ratio"] == pytest.approx(2, abs=0.05) and row["translation_gain"] == pytest.approx(2, abs=0.05)
    assert row["trans_err"] < 0.02 and row["rotation_error_deg"] < 0.1 and row["rot_err_deg"] < 0.1
    still = target.scale_translation(0.0)
    write_c2w(files["target.json"], still)
    code, (row,) = score()
    undefined = {name for name in CAMERA_METRICS if row[name] is None}
    assert code == 0 and undefined == {"scale_ratio", "translation_gain", "trans_err"}


@pytest.mark.parametrize("count", [1, 4, 5])
def test_few_videos_are_columns_and_many_are_lines(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"video": f"a/{i}.mp4", "trans_m": i / 8, "valid": True} for i in range(count)] + [{"video": "b.mp4"}]
    _print_table(rows[-count:])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    if count < 5:
        table = [list(line) for line in zip(*table, strict=True)]
    assert table[0] == ["video", "trans_m", "valid"][: len(table[0])] and len(table) == count + 1
    assert table[-1] == (["b.mp4", "-", "-"] if count > 1 else ["b.mp4"])
    if count > 1:
        assert table[1] == ["1.mp4", "0.1250", "True"]


def test_the_lens_follows_the_crop(score: Callable) -> None:
    """Pixels of the camera file are those of the source's frames, whatever size the scoring takes."""
    code, (row,) = score("--size", "48x48")
    assert code == 0 and row["trans_m"] < 0.02


def test_a_longer_video_says_which_frames_were_scored(score: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    code, (row,) = score(target="target4.json")
    assert code == 0 and row["trans_m"] < 0.02 and (row["frames"], row["video_frames"]) == (4, 5)
    assert "frames 0-3 of 5 were scored: the path has 4" in capsys.readouterr().err
    assert score("--frames", "3")[0] == 0
    assert "frames 0-2 of 5 were scored: --frames 3" in capsys.readouterr().err


def test_a_bad_file_costs_its_own_row(
    score: Callable, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = score("--plot", video="folder")
    assert code == 1 and [row["valid"] for row in rows] == [True, True, False]
    assert rows[2] == {"video": str(files["broken"]), "valid": False, "error": rows[2]["error"]}
    assert "c.mp4: cannot be decoded" in rows[2]["error"]
    shown = capsys.readouterr()
    assert "a.mov" in shown.out and "c.mp4" in shown.out and "c.mp4" in shown.err
    made = sorted(path.name for path in files["folder"].glob("*.png"))
    assert made == ["a.mov.png", "a.mp4.png"]


class Faulty:
    """Scores 1, with a NaN beside it; ``fault`` happens at the second video."""

    name, keys = "faulty", ("all",)

    def __init__(self, fault: Exception | float) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
        self.calls += 1
        score = torch.ones(1)
        if self.calls == 2 and isinstance(self.fault, Exception):
            raise self.fault
        if self.calls == 2:
            score = torch.tensor([self.fault])
        return RewardOutput({"all": score}, torch.tensor([True]), {"part": torch.tensor([math.nan])})


@pytest.mark.parametrize(
    ("fault", "text"), [(torch.cuda.OutOfMemoryError("CUDA out of memory."), "OutOfMemory"), (math.nan, "no finite")]
)
def test_a_failing_reward_costs_one_row(
    fault: Exception | float, text: str, score: Callable, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(files["retake.mp4"], files["broken"])
    reward = Faulty(fault)
    monkeypatch.setattr(registry, "build_reward", lambda kind, options: reward)
    code, rows = score(video="folder")
    assert code == 1 and [row["valid"] for row in rows] == [True, False, True]
    assert text in rows[1]["error"] and rows[1].get("score/all") is None
    assert rows[0]["score/all"] == 1.0 and rows[0]["part"] is None  # NaN is no JSON


@pytest.mark.parametrize("fault", [RuntimeError("CUDA out of memory.\nmore"), math.nan])
def test_a_single_video_without_a_score_ends_with_1(
    fault: Exception | float,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward = Faulty(fault)
    reward.calls = 1
    monkeypatch.setattr(registry, "build_reward", lambda kind, options: reward)
    given = [f"--{name}={files[file]}" for name, file in (("video", "retake.mp4"), ("trajectory", "target.json"))]
    given += [f"--source={files['source.mp4']}", f"--source-camera={files['source.npz']}"]
    assert main(["score", *given]) == 1
    text = "reward faulty failed (RuntimeError: CUDA out of memory.)" if isinstance(fault, Exception) else "no finite"
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("fps", [8, 24, 60])
def test_the_reward_is_told_the_files_own_frame_rate(
    fps: int, score: Callable, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []

    class Listening(Faulty):
        def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
            told.append(batch.fps)
            return super().__call__(videos, batch)

    write_video(files["retake.mp4"], torch.zeros(5, 3, 48, 64), fps)
    monkeypatch.setattr(registry, "build_reward", lambda kind, options: Listening(0.0))
    assert score()[0] == 0 and told == [fps]


def test_a_video_without_a_camera_is_lost_and_has_no_numbers(
    score: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound that no video reaches: what the tracker reads is not enough."""
    code, (row,) = score("--set", "min_tracked=1.0")
    assert code == 0 and row["valid"] is True and row["lost"] is True
    numbers = ("score/trans", "score/rot", "trans_m", "rot_deg", "saturated_fraction", *CAMERA_METRICS)
    assert all(row[name] is None for name in numbers)
    assert 0 < row["tracked"] < 1 and "nan" not in capsys.readouterr().out


def test_options_reach_the_reward_and_its_evaluator(score: Callable) -> None:
    rows = []
    for settings in ([], ["translation_bound=0.001"], ["evaluator_options.levels=[[4.0, 1]]"]):
        code, found = score(*(word for setting in settings for word in ("--set", setting)))
        assert code == 0
        rows += found
    plain, bounded, coarse = rows
    assert plain["saturated_fraction"] == 0 and bounded["saturated_fraction"] == 1  # the reward's option
    assert bounded["score/trans"] > plain["score/trans"] and bounded["trans_m"] == plain["trans_m"]
    assert coarse["trans_m"] > plain["trans_m"]  # the evaluator's: one blurred step reads worse than seven


def test_plots_replace_their_like_and_nothing_else(
    score: Callable, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = files["retake.mp4"].with_name("retake.mp4.png")
    assert score("--plot")[0] == 0
    first = ours.stat().st_ino
    assert score("--plot")[0] == 0 and ours.stat().st_ino != first
    Image.new("RGB", (4, 4)).save(ours)
    monkeypatch.setattr(registry, "build_reward", lambda *_: pytest.fail("built before the check"))
    assert score("--plot")[0] == 1
    assert "not written by geoalign" in capsys.readouterr().err
    with Image.open(ours) as picture:
        assert picture.size == (4, 4)


def test_a_sinking_camera_is_drawn_sinking() -> None:
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[:, 1, 3] = torch.tensor([0.0, 0.5, 1.0])  # OpenCV: y points down
    _, side = cameras_figure({"target": c2w, "estimated": c2w}).axes
    low, high = (side.transData.transform((0.0, y))[1] for y in (1.0, 0.0))
    assert low < high and side.get_ylabel() == "y (m, down)"


MAPANYTHING = "--evaluator mapanything --set evaluator_options.checkpoint=no --set evaluator_options.device="


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("--video {no}.mp4", 1, "no such video"),
        ("--video {broken}", 1, "c.mp4: cannot be decoded"),
        ("--trajectory {no}.json", 1, "no such camera file"),
        ("--source {broken}", 1, "c.mp4"),
        ("--source-camera {short.npz}", 1, "short.npz: 2 poses, 5 are needed; use --frames 2"),
        ("--source-camera {bare.npz}", 1, "no ground_plane"),
        ("--json {retake.mp4}/s.json", 1, "cannot be written"),
        ("--json {folder}", 2, "is a folder"),
        ("--evaluator plannar", 2, "did you mean 'planar'"),
        ("--evaluator mapanything", 2, "needs checkpoint"),
        ("--reward geometri", 2, "did you mean 'geometry'"),
        ("--reward hpsv3 --plot", 2, "reward hpsv3 has none"),
        ("--size 0x0", 2, "at least 16 pixels"),
        ("--set translation_bond=1", 2, "did you mean 'translation_bound'"),
        ("--set translation_bound=abc", 2, "options.translation_bound: input should be a valid number"),
        ("--set evaluator_options.levels=3", 2, "evaluator_options.levels: input should be a valid tuple"),
        ("--set temporal_weights=foo", 2, "temporal_weights: input should be 'linear'"),
        ("--evaluator mapanything --set evaluator_options.checkpoint=no", 1, "hf download facebook/"),
        (f"{MAPANYTHING}gpu", 2, "device 'gpu': no such device"),
        (f"{MAPANYTHING}cuda:99", 2, "device 'cuda:99': this machine has"),
        ("--reward hpsv3 --set checkpoint=no --set tokenizer=no --set device=gpu", 2, "device 'gpu': no such device"),
    ],
)
def test_wrong_requests_are_explained(
    arguments: str, code: int, text: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--video {retake.mp4} --trajectory {target.json} --source {source.mp4} --source-camera {source.npz} "
    for name, path in {**files, "no": tmp_path / "no"}.items():
        given, arguments = given.replace(f"{{{name}}}", str(path)), arguments.replace(f"{{{name}}}", str(path))
    assert main(["score", *given.split(), *arguments.split()]) == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ("", ["--trajectory"]),
        ("--trajectory {target.json}", ["--source-camera FILE", "--evaluator mapanything --set"]),
        ("--trajectory {target.json} --evaluator flow_pnp", ["--source-camera FILE", "--evaluator mapanything --set"]),
        ("--trajectory {target.json} --source-camera {source.npz}", ["give --source FILE"]),
    ],
)
def test_what_an_evaluator_misses_is_named(
    arguments: str, texts: list[str], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in files.items():
        arguments = arguments.replace(f"{{{name}}}", str(path))
    assert main(["score", "--video", str(files["retake.mp4"]), *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert all(text in shown for text in texts)


def test_tracking_needs_no_source_video(files: dict[str, Path]) -> None:
    given = [f"--{name}={files[file]}" for name, file in (("video", "retake.mp4"), ("trajectory", "target.json"))]
    assert main(["score", *given, f"--source-camera={files['source.npz']}", "--evaluator=flow_pnp"]) == 0
