"""Every format of camera files on its own quirks, and damaged files."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_files import write_c2w
from damage_records import ODD, places
from repository import GOLDEN

from geoalign.errors import DataError
from geoalign.geometry import so3
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.presets import preset
from geoalign.geometry.trajectory import CameraTrajectory

FOLDER = GOLDEN / "cameras"


def opened(name: object, **options: object) -> CameraTrajectory:
    """The whole path of a file, float64, relative to frame 0."""
    return open_camera(name, **options).path.relative_to_first()


def sample(frames: int = 7) -> CameraTrajectory:
    generator = torch.Generator().manual_seed(5)
    twist = torch.randn(frames, 6, dtype=torch.float64, generator=generator)
    lens = torch.rand(frames, 4, dtype=torch.float64, generator=generator) + 0.5
    return CameraTrajectory(so3.se3_exp(twist), lens).relative_to_first()


def test_recammaster_loader_reads_the_published_file() -> None:
    for number, name in ((1, "pan_right"), (5, "zoom_in"), (9, "arc_left")):
        loaded = opened(f"{FOLDER / 'camera_extrinsics.json'}#{number}")
        assert loaded.num_frames == 81 and torch.allclose(torch.linalg.det(loaded.rotation), torch.ones(81).double())
        # The integrator bends arcs by up to 1.3 cm; the orientation is that of the file (6 printed digits).
        same = preset(name, dtype=torch.float64)
        assert (loaded.position - same.position).norm(dim=-1).max() < 0.0135
        assert so3.relative_angle(loaded.rotation, same.rotation).max() < 1e-5


def test_c2w_files(tmp_path: Path) -> None:
    poses = sample().c2w.numpy()
    np.save(tmp_path / "full.npy", poses)
    np.save(tmp_path / "short.npy", poses[:, :3])
    (tmp_path / "list.json").write_text(json.dumps(poses.tolist()))
    (tmp_path / "keys.json").write_text(json.dumps({"c2w": poses.tolist(), "intrinsics": [[1, 2, 0.5, 0.5]] * 7}))
    for name in ("full.npy", "short.npy", "list.json", "keys.json"):
        loaded = opened(tmp_path / name)
        assert torch.allclose(loaded.c2w, sample().c2w, atol=1e-14)
    assert opened(tmp_path / "keys.json").intrinsics[3].tolist() == [1, 2, 0.5, 0.5]
    own = opened(tmp_path / "keys.json", intrinsics=(3.0, 3.0, 0.5, 0.5))
    assert own.intrinsics[0, 0] == 3


def test_vipe_files(tmp_path: Path) -> None:
    world = so3.se3_exp(torch.tensor([1.0, 2, 3, 0.1, 0.2, 0.3], dtype=torch.float64))
    pose, lens = tmp_path / "pose" / "clip.npz", tmp_path / "intrinsics" / "clip.npz"
    pose.parent.mkdir()
    lens.parent.mkdir()
    np.savez(pose, data=sample().transformed(world).c2w.numpy(), inds=np.arange(7))
    assert torch.allclose(opened(pose).c2w, sample().c2w, atol=1e-12)
    np.savez(lens, data=np.tile([416.0, 416.0, 416.0, 240.0], (7, 1)))
    loaded = opened(pose, image_size=(480, 832))
    assert torch.allclose(loaded.intrinsics[0], torch.tensor([0.5, 416 / 480, 0.5, 0.5]).double())
    assert torch.equal(opened(pose).intrinsics, loaded.intrinsics)  # the middle of its frames tells their size
    np.savez(lens, data=np.array([[416.0, 416.0, 416.0, 240.0]]), inds=np.array([0]))
    assert torch.equal(opened(pose).intrinsics, loaded.intrinsics)
    np.savez(lens, data=np.tile([416.0, 416.0, 400.3, 240.0], (7, 1)))
    with pytest.raises(DataError, match=r"image_size \(H, W\)"):
        opened(pose)
    np.savez(lens, data=np.tile([416.0, 416.0, 416.0, 240.0], (7, 1)), inds=np.arange(1, 8))
    with pytest.raises(DataError, match=r"intrinsics/clip\.npz: ViPE lost frames"):
        opened(pose)
    np.savez(lens, data=np.tile([416.0, 416.0, 416.0, 240.0], (7, 1)))
    np.savez(pose, data=sample().c2w.numpy(), inds=np.array([0, 1, 2, 4, 5, 6, 7]))
    with pytest.raises(DataError, match="lost frames"):
        opened(pose, image_size=(480, 832))


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
            opened(tmp_path / f"{name}.npy")
        assert name in str(caught.value)
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    with pytest.raises(DataError, match=r"c2w must be \[F, 4, 4\]"):
        opened(tmp_path / "flat.npy")


def test_recammaster_defects_name_frame_and_camera(tmp_path: Path) -> None:
    data = json.loads((FOLDER / "camera_extrinsics.json").read_text())
    file = tmp_path / "cameras.json"

    def refused(words: str, camera: str | int = 1) -> None:
        file.write_text(json.dumps(data))
        with pytest.raises(DataError, match=words):
            opened(f"{file}#{camera}")

    refused("no camera '11'; it holds cam01, cam02", 11)
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
    write_c2w(tmp_path / "good.npz", sample())
    write_c2w(tmp_path / "good.json", sample())
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
                opened(bad)  # a flip inside a digit may leave a valid file
            except DataError as error:
                assert str(bad) in str(error)
    for name, content in (("empty.npz", b""), ("empty.json", b""), ("a.json", b"{}"), ("b.json", b'"text"')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            opened(tmp_path / name)
    with pytest.raises(DataError, match="no such"):
        opened(tmp_path / "missing.json")
    for text, words in (("1", "has 1 numbers a line"), ("a\nb\n", "line 2"), ("words", "not a camera file")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(DataError, match=f"a.txt: .*{words}"):
            opened(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="not a camera file, which is an npz"):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("lens", "words"),
    [
        ({"camera_angle_x": 5e-324}, "lies between 0 and pi"),  # its half is 0
        ({"fl_x": 51.2, "cx": 1e308, "cy": 24.0}, "infinite intrinsics"),  # its double is
        ({"fl_x": 5e-324}, "intrinsics|focal length"),
    ],
)
def test_numbers_at_the_end_of_the_range_are_errors_of_the_file(tmp_path: Path, lens: object, words: str) -> None:
    frames = [{"file_path": f"{k}.png", "transform_matrix": np.eye(4).tolist()} for k in range(2)]
    file = tmp_path / "transforms.json"
    file.write_text(json.dumps({"w": 64, "h": 48, "frames": frames, **lens}))  # type: ignore[dict-item]
    with pytest.raises(DataError, match=words):
        opened(file, image_size=(48, 64))


def test_values_of_another_kind_at_any_place_give_one_clear_error(tmp_path: Path) -> None:
    """Every JSON format with every odd value at every place: the door's error, never one of NumPy's."""
    eye = np.eye(4).tolist()
    formats = {
        "own": {"extrinsic": [eye, eye], "intrinsic": np.eye(3).tolist(), "image_size": [48, 64], "metric": 1},
        "c2w": {"c2w": [eye, eye], "intrinsics": [0.8, 1.1, 0.5, 0.5], "image_size": [48, 64]},
        "nerfstudio": {"fl_x": 51.2, "w": 64, "h": 48, "k1": 0.0, "frames": [
            {"file_path": f"{k}.png", "transform_matrix": eye} for k in range(2)]},
        "sample": {"target_c2w": [eye, eye], "source_c2w": [eye, eye], "intrinsics": [0.8, 1.1, 0.5, 0.5],
                   "used": {"size": [48, 64]}, "ground_plane": [0, 1, 0, 2]},
        "recammaster": {"frame0": {"cam01": "[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1]"}},
    }  # fmt: skip
    for name, sound in formats.items():
        file = tmp_path / f"{name}.json"
        for place in list(places(sound))[1:]:
            for odd in (*ODD, [[1, 2], [3]], "9" * 5000 + ".png", ...):
                changed = copy.deepcopy(sound)
                holder = changed
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = odd
                if odd is ...:
                    del holder[place[-1]]
                file.write_text(json.dumps(changed, default=str) if odd != 10**400 else f'{{"c2w": {"9" * 400}}}')
                with contextlib.suppress(DataError):
                    found = opened(file, image_size=(48, 64), prefer="target")
                    assert torch.isfinite(found.c2w).all() and torch.isfinite(found.intrinsics).all()
