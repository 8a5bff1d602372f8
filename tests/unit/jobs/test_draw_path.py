"""The page for drawing a path holds the video, its camera's lens and ground, the presets and the law of training."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from geoalign.cli.main import main
from geoalign.config.data import RescaleConfig
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.data.video import write_video
from geoalign.errors import DataError
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.presets import PRESETS, preset
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.draw_path import write_path_page

LENS, PLANE = (0.8, 1.1, 0.5, 0.5), torch.tensor([0.0, 1.0, 0.0, 1.5], dtype=torch.float64)


def test_the_page_starts_from_the_video_and_what_is_known_of_it(tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "page.html"
    write_video(clip, torch.rand(7, 3, 32, 48) * 2 - 1, 12.0)
    assert main(["path", "draw", "--video", str(clip), "--out", str(out), "--config", "tiny_cpu"]) == 0
    facts = json.loads(re.findall(r'id="drawing">(.*?)</script>', out.read_text())[0])
    law = load_config(Config, "tiny_cpu").data.trajectories.rescale
    assert facts["frames"] == 7 and facts["size"] == [32, 48] and facts["plane"] is None
    assert facts["metres"] == [law.translation.mean, law.translation.low, law.translation.high]
    assert facts["fps"] == law.play_fps and list(facts["presets"]) == list(PRESETS)
    truth = preset("arc_left", 7, dtype=torch.float64).c2w[:, :3]
    assert torch.allclose(torch.tensor(facts["presets"]["arc_left"], dtype=torch.float64), truth, atol=1e-6)
    camera = CameraTrajectory.build(torch.eye(4, dtype=torch.float64).repeat(7, 1, 1), LENS)
    write_clip_camera(clip.with_suffix(".npz"), camera, (32, 48), ground_plane=PLANE)
    assert main(["path", "draw", "--video", str(clip), "--out", str(out), "--frames", "5"]) == 0
    facts = json.loads(re.findall(r'id="drawing">(.*?)</script>', out.read_text())[0])
    assert facts["frames"] == 5 and facts["plane"] == PLANE.tolist() and facts["lens"] == pytest.approx(LENS)


def test_the_printed_command_takes_a_name_with_spaces(tmp_path: Path) -> None:
    clip, out = tmp_path / "my 'best' <clip> {0}.mp4", tmp_path / "page.html"
    write_video(clip, torch.rand(3, 3, 32, 48) * 2 - 1, 12.0)
    assert main(["path", "draw", "--video", str(clip), "--out", str(out)]) == 0
    command = html.unescape(re.findall(r"<pre>(geoalign sample .*?)<span", out.read_text())[0])
    assert shlex.split(command)[2:4] == ["--video", clip.name]


def test_a_video_without_a_second_frame_is_blamed_and_no_option(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", torch.zeros(1, 3, 32, 48), 12.0)
    with pytest.raises(DataError, match=r"clip\.mp4: 1 frame, and a path needs 2 or more"):
        write_path_page(tmp_path / "clip.mp4", tmp_path / "page.html", RescaleConfig())


@pytest.mark.parametrize(
    ("options", "words"), [(["--frames", "9"], "has 4 frames"), (["--out", "page.txt"], "must end in .html")]
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, torch.zeros(4, 3, 32, 48), 12.0)
    arguments = ["path", "draw", "--video", str(clip), "--out", str(tmp_path / "page.html"), *options]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
