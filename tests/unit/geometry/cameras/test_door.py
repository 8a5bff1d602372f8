"""The door: how a camera is named, and that nothing else reads camera files."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import GOLDEN, ROOT

from geoalign.errors import DataError, UsageError
from geoalign.geometry.cameras.door import is_preset, open_camera, open_file, open_target, split_name
from geoalign.geometry.lens import cover_crop_intrinsics, intrinsics_before_crop
from geoalign.geometry.presets import preset

MULTICAM = GOLDEN / "cameras" / "camera_extrinsics.json"

ARRAY_READERS = {
    "geoalign/geometry/cameras/content.py": "camera files of every format",
    "geoalign/benchmark/measure.py": "cameras and videos that the benchmark wrote itself",
    "geoalign/benchmark/tools/answers.py": "what a foreign tool answered",
    "geoalign/benchmark/tools/runners/run_vipe.py": "what ViPE wrote, in an environment without geoalign",
    "geoalign/report/run_folder.py": "the clips that `evaluate` wrote, which are no cameras of the user",
}


def test_nothing_else_loads_arrays() -> None:
    """A verb with a reader of its own would be a second meaning of `--trajectory`."""
    found = set()
    for file in sorted((ROOT / "geoalign").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            loads = isinstance(node, ast.Attribute) and node.attr in ("load", "loadtxt", "genfromtxt")
            numpy = loads and isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy")
            imported = isinstance(node, ast.ImportFrom) and node.module == "numpy"
            bounded = isinstance(node, ast.ImportFrom) and node.module == "geoalign.files.arrays"
            if bounded or numpy or (imported and any(name.name.startswith("load") for name in node.names)):
                found.add(file.relative_to(ROOT).as_posix())
    assert found == set(ARRAY_READERS)


def test_a_file_whose_name_holds_the_mark_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "take#2.npy"
    np.save(file, np.tile(np.eye(4), (3, 1, 1)))
    assert split_name(file) == (file, "") and open_camera(file).path.num_frames == 3
    assert split_name(tmp_path / "a.json#cam05") == (tmp_path / "a.json", "cam05")
    assert split_name("#cam05") == (Path("#cam05"), "")


def test_the_published_cameras_are_the_presets() -> None:
    assert open_file(MULTICAM).cameras == tuple(f"cam{number:02d}" for number in range(1, 11))
    for number in range(1, 11):
        named, typed = open_camera(f"{MULTICAM}#cam{number:02d}"), open_camera(str(number), frames=81)
        assert named.format == "ReCamMaster JSON" and typed.format == "preset" and not named.has_lens
        apart = named.path.relative_to_first().position - typed.path.position
        assert apart.norm(dim=-1).max() < 0.0135  # ReDirector's integrator bends the arcs
    with pytest.raises(DataError, match=r"cam01, .*cam10; choose one, as in camera_extrinsics\.json#cam01"):
        open_camera(MULTICAM)


def test_a_word_is_a_preset_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tilt_up").mkdir()
    assert is_preset("tilt_up") and is_preset("Pan-Right") and not is_preset("a/tilt_up") and not is_preset("x.npy")
    np.save(tmp_path / "a.npy", np.tile(np.eye(4), (3, 1, 1)))
    (tmp_path / "a.npy").rename(tmp_path / "arc_left")
    assert not is_preset("arc_left") and open_camera("arc_left").format == "c2w"
    with pytest.raises(UsageError, match="or a camera file"):
        is_preset("cams")
    with pytest.raises(UsageError, match="no length of its own"):
        open_camera("tilt_up")
    with pytest.raises(DataError, match="no such camera file"):
        open_camera("a/tilt_up")


def test_targets_take_the_callers_lens_and_speed(tmp_path: Path) -> None:
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 2, 3] = np.arange(5)
    np.savez(tmp_path / "a.npz", c2w=poses, intrinsics=[0.7, 0.7, 0.5, 0.5])
    own, other = (
        open_target(tmp_path / "a.npz", 3, speed=2.0, intrinsics=lens) for lens in (None, (1.0, 2.0, 0.5, 0.5))
    )
    assert own.dtype == torch.float32 and own.position[:, 2].tolist() == [0, 2, 4]
    torch.testing.assert_close(own.intrinsics[2], torch.tensor([0.7, 0.7, 0.5, 0.5]))
    assert other.intrinsics[0].tolist() == [1, 2, 0.5, 0.5]
    asked = open_target("arc_left", 9, speed=1.5, intrinsics=(1.0, 2.0, 0.5, 0.5))
    assert torch.equal(asked.c2w, preset("arc_left", 9, speed=1.5).c2w) and asked.intrinsics[3, 1] == 2


@pytest.mark.parametrize("size", [(48, 48), (480, 832), (32, 90)])
def test_a_crop_of_the_lens_can_be_undone(size: tuple[int, int]) -> None:
    lens = torch.tensor([0.9, 1.2, 0.45, 0.55], dtype=torch.float64)
    back = intrinsics_before_crop(cover_crop_intrinsics(lens, 50, 71, size), 50, 71, size)
    torch.testing.assert_close(back, lens, atol=1e-14, rtol=0)
