"""Rewards and evaluators that are not ours: named by place or entry point, checked like the built-in ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from geoalign.cli.main import main
from geoalign.config.load import load_config
from geoalign.config.rewards import RewardConfig
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.rewards.registry import build_evaluator, build_reward, build_rewards

MODULE = """
from geoalign.evaluators.base import PoseEstimate
from geoalign.rewards.base import RewardOutput
import torch

class Level:
    name, keys = "level", ("level",)
    def __init__(self, wanted: float, sizes: tuple[int, ...] = (1,)):
        self.wanted, self.sizes = wanted, sizes
    def __call__(self, videos, batch):
        score = -(videos.mean((1, 2, 3, 4)) - self.wanted).abs()
        return RewardOutput({"level": score}, torch.isfinite(score))

class Still:
    name = "still"
    def __init__(self, metres: float = 0.0):
        self.metres = metres
    def __call__(self, video, source):
        poses = torch.eye(4).repeat(len(video), video.shape[1], 1, 1)
        poses[:, 1:, 2, 3] = self.metres
        return PoseEstimate(poses, torch.arange(video.shape[1]), torch.ones(len(video)), torch.zeros(len(video)))

class Nameless:
    def __call__(self, videos, batch):
        return None

number = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``own_rewards`` of somebody else, installed with entry points ``level`` and ``still``."""
    (tmp_path / "own_rewards.py").write_text(MODULE)
    info = tmp_path / "own_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[geoalign.rewards]\nlevel = own_rewards:Level\n[geoalign.evaluators]\nstill = own_rewards:Still\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


@pytest.mark.parametrize("kind", ["own_rewards:Level", "level"])
def test_an_own_reward_scores_and_its_options_get_their_types(kind: str) -> None:
    reward: Any = build_reward(kind, {"wanted": 1, "sizes": [2, 3]})  # as YAML gives them
    assert reward.wanted == 1.0 and isinstance(reward.wanted, float) and reward.sizes == (2, 3)
    videos = torch.tensor([0.0, 0.5])[:, None, None, None, None].expand(2, 5, 3, 4, 4)
    torch.testing.assert_close(reward(videos, None).scores["level"], torch.tensor([-1.0, -0.5]))


@pytest.mark.parametrize("name", ["own_rewards:Still", "still"])
def test_the_geometry_reward_takes_an_own_evaluator(name: str) -> None:
    reward: Any = build_reward("geometry", {"evaluator": name, "evaluator_options": {"metres": 2}})
    estimate = reward.evaluator(torch.zeros(1, 5, 3, 4, 4), build_source())
    assert float(estimate.c2w[0, -1, 2, 3]) == 2.0


def build_source() -> Any:
    from geoalign.geometry.trajectory import CameraTrajectory
    from geoalign.types import SourceClip

    camera = CameraTrajectory.stack([CameraTrajectory.identity(5)])
    return SourceClip(torch.zeros(1, 5, 3, 4, 4), camera, None, ("clip",))


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("own_rewards:Level", {}, "needs wanted"),
        ("own_rewards:Level", {"wanted": "much"}, "options.wanted: input should be a valid number"),
        ("own_rewards:Level", {"wanted": 1, "size": 2}, "did you mean 'sizes'"),
        ("own_rewards:Levels", {}, "own_rewards has no 'Levels'"),
        ("own_reward:Level", {}, "no module 'own_reward'; install it, or run with PYTHONPATH=FOLDER"),
        ("own_rewards:number", {}, "is a int"),
        ("own_rewards:Nameless", {}, "gave a Nameless, which needs a name, keys"),
        ("levels", {}, "did you mean 'level'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(kind, options)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_configuration_names_it_and_a_run_checks_it_first() -> None:
    own = ["rewards.mine.kind=own_rewards:Level", "rewards.mine.options.wanted=0.2", "advantage.weights.level=0.1"]
    config = load_config(Config, "smoke", own)
    rewards = build_rewards(config.rewards)
    assert rewards["mine"].keys == ("level",)
    with pytest.raises(ConfigError, match=r"rewards\.mine\.options\.wanted"):
        build_rewards({"mine": RewardConfig(kind="own_rewards:Level", options={"wanted": "x"})})


def test_a_wrong_name_on_the_command_line_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--video", "v.mp4", "--trajectory", "pan_right", "--reward", "own_rewards:No"]) == 2
    assert "own_rewards has no 'No'" in capsys.readouterr().err


def test_an_own_evaluator_must_be_one() -> None:
    with pytest.raises(ConfigError, match="pose evaluator own_rewards:Nameless gave a Nameless, which needs a name"):
        build_evaluator("own_rewards:Nameless")
