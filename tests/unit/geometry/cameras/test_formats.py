"""Presets against the published resampling, trajectory files in four formats, and damaged files."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import GOLDEN

from geoalign.errors import DataError, UsageError
from geoalign.geometry import so3
from geoalign.geometry.cameras.formats import load_trajectory, save_trajectory
from geoalign.geometry.presets import PRESETS, preset, preset_name, retime
from geoalign.geometry.trajectory import CameraTrajectory

FOLDER = GOLDEN / "cameras"


def sample(frames: int = 7) -> CameraTrajectory:
    generator = torch.Generator().manual_seed(5)
    twist = torch.randn(frames, 6, dtype=torch.float64, generator=generator)
    lens = torch.rand(frames, 4, dtype=torch.float64, generator=generator) + 0.5
    return CameraTrajectory(so3.se3_exp(twist), lens).relative_to_first()


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


def test_recammaster_loader_reads_the_published_file() -> None:
    for number, name in ((1, "pan_right"), (5, "zoom_in"), (9, "arc_left")):
        loaded = load_trajectory(FOLDER / "camera_extrinsics.json", camera=number, dtype=torch.float64)
        assert loaded.num_frames == 81 and torch.allclose(torch.linalg.det(loaded.rotation), torch.ones(81).double())
        # The integrator bends arcs by up to 1.3 cm; the orientation is that of the file (6 printed digits).
        same = preset(name, dtype=torch.float64)
        assert (loaded.position - same.position).norm(dim=-1).max() < 0.0135
        assert so3.relative_angle(loaded.rotation, same.rotation).max() < 1e-5


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_own_files_round_trip_exactly(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"with space and \u00e9{suffix}"
    save_trajectory(file, sample())
    loaded = load_trajectory(file, dtype=torch.float64)
    # Validation projects rotations onto SO(3): at most a few roundings.
    assert torch.allclose(loaded.c2w, sample().c2w, atol=1e-14) and torch.equal(loaded.intrinsics, sample().intrinsics)
    assert load_trajectory(file).dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_saving_refuses_other_suffixes_and_batches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="txt"):
        save_trajectory(tmp_path / "a.txt", sample())
    with pytest.raises(UsageError, match="batch"):
        save_trajectory(tmp_path / "a.json", CameraTrajectory.stack([sample(), sample()]))
    assert not list(tmp_path.iterdir())


def test_opencv_files(tmp_path: Path) -> None:
    poses = sample().c2w.numpy()
    np.save(tmp_path / "full.npy", poses)
    np.save(tmp_path / "short.npy", poses[:, :3])
    (tmp_path / "list.json").write_text(json.dumps(poses.tolist()))
    (tmp_path / "keys.json").write_text(json.dumps({"c2w": poses.tolist(), "intrinsics": [[1, 2, 0.5, 0.5]] * 7}))
    for name in ("full.npy", "short.npy", "list.json", "keys.json"):
        loaded = load_trajectory(tmp_path / name, dtype=torch.float64)
        assert torch.allclose(loaded.c2w, sample().c2w, atol=1e-14)
    assert load_trajectory(tmp_path / "keys.json").intrinsics[3].tolist() == [1, 2, 0.5, 0.5]
    own = load_trajectory(tmp_path / "keys.json", intrinsics=(3.0, 3.0, 0.5, 0.5))
    assert own.intrinsics[0, 0] == 3


def test_vipe_files(tmp_path: Path) -> None:
    world = so3.se3_exp(torch.tensor([1.0, 2, 3, 0.1, 0.2, 0.3], dtype=torch.float64))
    pose, lens = tmp_path / "pose" / "clip.npz", tmp_path / "intrinsics" / "clip.npz"
    pose.parent.mkdir()
    lens.parent.mkdir()
    np.savez(pose, data=sample().transformed(world).c2w.numpy(), inds=np.arange(7))
    assert torch.allclose(load_trajectory(pose, dtype=torch.float64).c2w, sample().c2w, atol=1e-12)
    np.savez(lens, data=np.tile([416.0, 416.0, 416.0, 240.0], (7, 1)))
    loaded = load_trajectory(pose, image_size=(480, 832))
    assert torch.allclose(loaded.intrinsics[0], torch.tensor([0.5, 416 / 480, 0.5, 0.5]))
    with pytest.raises(DataError, match="image size"):
        load_trajectory(pose)
    np.savez(pose, data=sample().c2w.numpy(), inds=np.array([0, 1, 2, 4, 5, 6, 7]))
    with pytest.raises(DataError, match="lost frames"):
        load_trajectory(pose, image_size=(480, 832))


def test_reflections_nan_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    for name, edit, words in (
        ("mirror", lambda p: p.__setitem__((slice(None), 0), -p[:, 0]), "reflection"),
        ("nan", lambda p: p.__setitem__((2, 0, 3), math.nan), "frame 2: NaN"),
        ("shear", lambda p: p.__setitem__((2, 0, 1), 3.0), "not a rotation"),
    ):
        poses = sample().c2w.numpy().copy()
        edit(poses)
        np.save(tmp_path / f"{name}.npy", poses)
        with pytest.raises(DataError, match=words) as caught:
            load_trajectory(tmp_path / f"{name}.npy")
        assert name in str(caught.value)
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    with pytest.raises(DataError, match="frames, 4, 4"):
        load_trajectory(tmp_path / "flat.npy")


def test_recammaster_defects_name_frame_and_camera(tmp_path: Path) -> None:
    data = json.loads((FOLDER / "camera_extrinsics.json").read_text())
    file = tmp_path / "cameras.json"

    def refused(words: str, camera: str | int = 1) -> None:
        file.write_text(json.dumps(data))
        with pytest.raises(DataError, match=words):
            load_trajectory(file, camera=camera)

    refused("no camera 'cam11'", 11)
    text = data["frame7"]["cam01"]
    data["frame7"]["cam01"] = "[1 0 0 0] [0 1 0 0]"
    refused("frame7 cam01: 16 numbers")
    data["frame7"]["cam01"] = text.replace("3390", "x")
    refused("frame7 cam01")
    data["frame7"]["cam01"] = text.replace("3390", "nan")
    refused("NaN")
    del data["frame7"]
    refused("frame7 is missing")


def test_damaged_files_give_one_clear_error(tmp_path: Path) -> None:
    save_trajectory(tmp_path / "good.npz", sample())
    save_trajectory(tmp_path / "good.json", sample())
    np.save(tmp_path / "good.npy", sample().c2w.numpy())
    generator = np.random.default_rng(0)
    for suffix in ("npz", "json", "npy"):
        raw = (tmp_path / f"good.{suffix}").read_bytes()
        bad = tmp_path / f"bad.{suffix}"
        for trial in range(60):
            data = bytearray(raw[: generator.integers(len(raw))] if trial % 2 else raw)
            for place in generator.integers(max(len(data), 1), size=4 if data else 0):
                data[place] ^= 1 << generator.integers(8)
            bad.write_bytes(bytes(data))
            try:
                load_trajectory(bad)  # a flip inside a digit may leave a valid file
            except DataError as error:
                assert str(bad) in str(error)
    for name, content in (("empty.npz", b""), ("empty.json", b""), ("a.json", b"{}"), ("b.json", b'"text"')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_trajectory(tmp_path / name)
    with pytest.raises(DataError, match="no such"):
        load_trajectory(tmp_path / "missing.json")
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(DataError, match=r"not '\.txt'"):
        load_trajectory(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="unknown trajectory format"):
        load_trajectory(tmp_path / "good.json", format="colmap")  # type: ignore[arg-type]
