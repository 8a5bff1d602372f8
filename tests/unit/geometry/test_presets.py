"""Presets against the published resampling, their names and the package data."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch
from repository import GOLDEN

from geoalign.errors import UsageError
from geoalign.geometry import so3
from geoalign.geometry.presets import PRESETS, preset, preset_name, retime
from geoalign.geometry.trajectory import CameraTrajectory

FOLDER = GOLDEN / "cameras"


def test_presets_equal_the_published_resampling() -> None:
    golden = np.load(FOLDER / "presets.npz")
    assert len(golden.files) == 30
    for key in golden.files:
        kind, frames, speed = key.split("_")
        ours = preset(int(kind[4:]), int(frames[1:]), speed=float(speed[5:]), dtype=torch.float64)
        # Same float64 integrator over the same published digits: 81 accumulated roundings.
        assert np.abs(ours.c2w.numpy() - golden[key]).max() < 1e-12, key


def test_package_data_holds_the_published_numbers() -> None:
    published = json.loads((FOLDER / "camera_extrinsics.json").read_text())
    data = json.loads(resources.files("geoalign.geometry").joinpath("preset_cameras.json").read_text())
    assert tuple(data["cameras"]) == PRESETS
    for number, columns in enumerate(data["cameras"].values(), 1):
        for frame in range(81):
            text = published[f"frame{frame}"][f"cam{number:02d}"].replace("[", " ").replace("]", " ")
            rows = np.array(text.split(), dtype=np.float64).reshape(4, 4)
            stored = [c[frame] if isinstance(c, list) else c for c in columns]
            assert rows[:, :3].ravel().tolist() == stored and rows[:, 3].tolist() == [0, 0, 0, 1]


def test_presets_move_as_named() -> None:
    end = {name: preset(name, dtype=torch.float64) for name in PRESETS}
    reach = 80 / 80.5  # published paths stop half a step short
    assert abs(float(end["zoom_in"].position[-1, 2]) - 2 * reach) < 1e-3
    assert float(end["translate_up"].position[-1, 1]) < -0.9 and float(end["arc_left"].position[-1, 0]) < -1.9
    for name, axis, degrees in (("pan_right", 1, 20), ("pan_left", 1, -20), ("tilt_up", 0, 10), ("tilt_down", 0, -10)):
        angle = torch.rad2deg(so3.log(end[name].rotation[-1]))[axis]
        assert abs(float(angle) - degrees * reach) < 1e-3
    assert preset("zoom_in", 49).position[-1, 2] < preset("zoom_in", 81).position[-1, 2] * 0.61
    assert torch.equal(preset("arc_left", 1).c2w, torch.eye(4)[None])


def test_retime_falls_back_to_the_first_axis_when_rotations_cancel() -> None:
    rotvec = torch.tensor([[0.1, 0, 0], [-0.1, 0, 0]], dtype=torch.float64)
    path = CameraTrajectory.from_increments(rotvec, torch.zeros(2, 3, dtype=torch.float64), torch.ones(3, 4).double())
    assert torch.allclose(retime(path.c2w, 3), path.c2w, atol=1e-12)


def test_preset_names() -> None:
    assert preset_name(1) == preset_name("Pan-Right") == "pan_right" and preset_name("10") == "arc_right"
    with pytest.raises(UsageError, match="did you mean 'zoom_in'"):
        preset_name("zoom_on")
    with pytest.raises(UsageError, match="type 1 to 10"):
        preset_name(11)
