"""What a newcomer is told to ask of the demo's model is what that model can do."""

from __future__ import annotations

import re

import torch
from repository import ROOT

from geoalign.cli.completion import parsers
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.geometry import so3
from geoalign.geometry.presets import preset
from geoalign.world.motion import ground_normal

ASKED = re.compile(r"sample --model (?:runs/tiny_cpu|exported) .*--trajectory (\w+)(?![.\w])(?: --speed (\d+))?")


def test_the_demos_model_is_asked_to_move_as_it_was_trained_to() -> None:
    """No turn but about the vertical of its world, and 0.6 to 2.4 m at the farthest: as it was trained."""
    help_of_sample = dict(parsers())["sample",].format_help()
    asked = [ASKED.findall(text) for text in ((ROOT / "README.md").read_text("utf-8"), help_of_sample)]
    assert all(asked)
    config = load_config(Config, "tiny_cpu")
    assert config.world is not None
    vertical = ground_normal(config.world).double()
    for name, speed in (each for found in asked for each in found):
        path = preset(name, config.data.num_frames, speed=float(speed or 1), dtype=torch.float64)
        turn = so3.log(path.c2w[:, :3, :3])
        assert torch.allclose(turn, (turn @ vertical)[:, None] * vertical, rtol=0, atol=1e-9), name
        assert 0.6 <= path.position.norm(dim=-1).amax() <= 2.4, (name, speed)
