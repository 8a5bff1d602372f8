"""Every verb that takes a camera, with every kind of camera: the numbers of numpy, or one line with the fix.

The truth is one path of nine poses, forward by 0.1 m and right by 2 degrees a frame, in a world of its own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from geoalign.cli import sample as sample_cli
from geoalign.cli import score as score_cli
from geoalign.cli.main import main
from geoalign.cli.options import CAMERA_HELP
from geoalign.config.data import ClipsConfig, DataConfig, TrajectoriesConfig
from geoalign.data.clip_record import ClipRecord
from geoalign.data.loader import ClipLoader
from geoalign.data.tally import Tally
from geoalign.data.trajectories import load_pool
from geoalign.data.video import PyAVReader, write_video
from geoalign.errors import DataError, UserError
from geoalign.geometry.cameras.door import open_camera
from geoalign.geometry.cameras.formats import FORMATS
from geoalign.geometry.presets import preset
from geoalign.jobs import sample
from geoalign.jobs.score import read_condition
from geoalign.rewards.base import RewardOutput
from geoalign.types import RetakeBatch

F, SIZE = 9, (48, 64)
LENS = np.array([0.9, 1.2, 0.5, 0.48])
PIXELS = LENS * np.array([64, 48, 64, 48])
PLANE = np.array([0.0, 0.6, 0.8, 3.0])
TINY_BASE = Path(str(resources.files("geoalign"))) / "_assets" / "tiny_base.safetensors"


def yaw(degrees: float) -> np.ndarray:
    """``[4, 4]``: a turn about +y (down), to the right."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])


def true_path() -> np.ndarray:
    poses = np.tile(np.eye(4), (F, 1, 1))
    for f in range(1, F):
        step = yaw(2.0)
        step[2, 3] = 0.1
        poses[f] = poses[f - 1] @ step
    return poses


TRUTH = true_path()
WORLD = yaw(40.0) @ np.array([[1, 0, 0, 3], [0, 0, -1, 4], [0, 1, 0, 5], [0, 0, 0, 1.0]])
"""Where frame 0 stands in the files' own world."""


def unreal(c2w: np.ndarray) -> str:
    """Right, down, forward in metres to Unreal's forward, right, up in centimetres, as row vectors in brackets."""
    change = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    rows = change @ c2w @ np.linalg.inv(change)
    rows[:3, 3] *= 100
    return " ".join("[" + " ".join(f"{value:.9g}" for value in row) + "]" for row in rows.T) + " "


def matrices(lens: np.ndarray) -> np.ndarray:
    return np.array([[lens[0], 0, lens[2]], [0, lens[1], lens[3]], [0, 0, 1]])


def write_files(folder: Path) -> None:
    world = WORLD @ TRUTH
    own = {"extrinsic": world, "intrinsic": matrices(PIXELS), "image_size": np.array(SIZE), "metric": np.array(True)}
    normal = WORLD[:3, :3] @ PLANE[:3]
    plane = np.append(normal, PLANE[3] + normal @ WORLD[:3, 3])
    np.savez(folder / "plane.npz", ground_plane=plane, **own)
    np.savez(folder / "own.npz", **own)
    np.savez(folder / "long_plane.npz", ground_plane=2 * plane, **own)
    np.savez(folder / "scale_free.npz", extrinsic=world, intrinsic=matrices(PIXELS))
    np.savez(folder / "c2w.npz", c2w=world, intrinsics=LENS)
    np.save(folder / "c2w.npy", world[:, :3])
    np.save(folder / "c2w.txt.npy", world)
    (folder / "c2w.txt.npy").rename(folder / "c2w.dat")
    np.save(folder / "pickled.npy", np.array([{"c2w": world}], dtype=object), allow_pickle=True)
    np.save(folder / "short.npy", world[:5])
    np.save(folder / "nan.npy", np.where(np.arange(F)[:, None, None] == 4, np.nan, world))
    np.save(folder / "mirror.npy", world * np.array([-1, 1, 1, 1.0]))
    (folder / "cut.npz").write_bytes((folder / "own.npz").read_bytes()[:700])
    pose, lens = folder / "vipe" / "pose", folder / "vipe" / "intrinsics"
    pose.mkdir(parents=True)
    lens.mkdir()
    np.savez(pose / "v.npz", data=world.astype(np.float64), inds=np.arange(F))
    np.savez(lens / "v.npz", data=np.tile(PIXELS, (F, 1)), inds=np.arange(F))
    np.savez(pose / "gap.npz", data=world, inds=np.array([0, 1, 2, 3, 5, 6, 7, 8, 9]))
    still = np.tile(np.eye(4), (F, 1, 1))
    frames = [{"cam01": unreal(np.eye(4)), "cam05": unreal(pose)} for pose in TRUTH]
    jsons: dict[str, Any] = {
        "list.json": world.tolist(),
        "keys.json": {"c2w": world.tolist(), "intrinsics": LENS.tolist()},
        "several.json": {f"frame{f}": frames[f] for f in reversed(range(F))},
        "one.json": {f"frame{f}": {"cam05": frames[f]["cam05"]} for f in range(F)},
        "out.json": {
            "target_c2w": TRUTH.tolist(), "source_c2w": still.tolist(), "intrinsics": LENS.tolist(),
            "ground_plane": PLANE.tolist(), "used": {"size": list(SIZE)},
        },
        "split.json": {"quats": [[1, 0, 0, 0]] * F, "trans": [[0, 0, 0]] * F, "focals": [50] * F, "cx": 32, "cy": 24},
    }  # fmt: skip
    jsons |= published(folder, world)
    for name, value in jsons.items():
        (folder / name).write_text(json.dumps(value))


def published(folder: Path, world: np.ndarray) -> dict[str, Any]:
    """The same path as other tools write it: texts and npz are written here, JSON is returned."""
    w2c = np.linalg.inv(world)
    opengl = world * np.array([1, -1, -1, 1.0])  # columns: the camera's axes
    fx, fy, cx, cy = PIXELS
    np.savez(folder / "vggt.npz", extrinsic=w2c[None, :, :3], intrinsic=matrices(np.array([fx, fy, 32, 24])))
    np.savez(folder / "pixels.npz", c2w=world, intrinsics=PIXELS)
    np.savez(folder / "matrix.npz", c2w=world, intrinsics=matrices(PIXELS))
    np.savez(folder / "off_size.npz", c2w=world, intrinsics=[130.0, 130, 64, 48])
    np.save(folder / "w2c.npy", w2c)
    np.save(folder / "cm.npy", world[:, :3] * np.array([1, 1, 1, 100.0]))
    np.save(folder / "opengl.npy", opengl)
    numbers = lambda row: " ".join(f"{value:.17g}" for value in row)  # noqa: E731
    lens = numbers(LENS)
    rows = [f"{33333 * f} {lens} 0 0 {numbers(pose[:3].ravel())}" for f, pose in enumerate(w2c)]
    (folder / "re10k.txt").write_text("\n".join(["https://www.youtube.com/watch?v=x", *rows]))
    (folder / "re10k_gap.txt").write_text("\n".join(["https://x", *rows[:4], *rows[5:]]))
    (folder / "kitti.txt").write_text("\r\n".join(numbers(pose[:3].ravel()) for pose in world))
    turns = Rotation.from_matrix(world[:, :3, :3]).as_quat()
    tum = [f"{f / 24} {numbers(world[f, :3, 3])} {numbers(turns[f])}" for f in range(F)]
    (folder / "tum.txt").write_text("# timestamp tx ty tz qx qy qz qw\n" + "\n".join(tum) + "\n")
    frames = [{"file_path": f"images/frame_{f + 1:05d}.png", "transform_matrix": opengl[f].tolist()} for f in range(F)]
    nerf = {"w": 64, "h": 48, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "camera_model": "OPENCV", "k1": 1e-4}
    return {
        "transforms.json": nerf | {"frames": frames[::-1]},
        "transforms_gap.json": nerf | {"frames": frames[:4] + frames[5:]},
        "bent.json": nerf | {"k1": -0.2, "frames": frames},
        "fisheye.json": nerf | {"camera_model": "OPENCV_FISHEYE", "frames": frames},
    }


@dataclass(frozen=True)
class Kind:
    """What a camera file should give, or the words of its refusal by all verbs but those in ``but``."""

    lens: np.ndarray | None = None
    plane: np.ndarray | None = None
    refused: str = ""
    but: tuple[str, ...] = ()


GOOD = Kind(lens=LENS)
KINDS = {
    "plane.npz": Kind(LENS, PLANE), "own.npz": GOOD, "c2w.npz": GOOD, "c2w.npy": Kind(), "list.json": Kind(),
    "keys.json": GOOD, "several.json#cam05": Kind(), "several.json#5": Kind(), "one.json": Kind(), "c2w.dat": Kind(),
    "one.json#cam05": Kind(), "out.json#target": Kind(LENS, PLANE), "vipe/pose/v.npz": GOOD,
    "out.json": Kind(LENS, PLANE, "holds the cameras source, target; choose one, as in out.json#source",
                     but=("sample --trajectory", "score --trajectory", "data.trajectories")),
    "several.json": Kind(refused="holds the cameras cam01, cam05; choose one, as in several.json#cam01",
                         but=("data.trajectories",)),
    "several.json#cam02": Kind(refused="no camera 'cam02'; it holds cam01, cam05"),
    "c2w.npy#cam05": Kind(refused="holds one camera without a name; drop #cam05"),
    "short.npy": Kind(refused="5 poses, 9 are needed; use --frames 5|5 poses, frame 8 is needed|fewer than 9",
                      but=("sample --trajectory", "score --trajectory")),
    "long_plane.npz": Kind(refused=r"\|n\| = 1"),
    "nan.npy": Kind(refused="frame 4: NaN"),
    "mirror.npy": Kind(refused="reflection"),
    "pickled.npy": Kind(refused="holds Python objects"),
    "cut.npz": Kind(refused="damaged npz"),
    "vipe/pose/gap.npz": Kind(refused="ViPE lost frames"),
    "split.json": Kind(refused="not a known camera file .has the keys quats.*; known: npy, npz or JSON with c2w"),
    "in.mp4": Kind(refused="not a camera file, which is an npz"),
    "none.npy": Kind(refused="none.npy: no such"),
    "pixels.npz": GOOD, "matrix.npz": GOOD, "kitti.txt": Kind(), "tum.txt": Kind(),
    "w2c.npy#direction=w2c": Kind(), "opengl.npy#axes=opengl": Kind(), "cm.npy#unit=cm": Kind(),
    "several.json#cam05:unit=m": Kind(), "transforms.json#unit=m": GOOD, "re10k.txt#unit=m": GOOD,
    "vggt.npz#unit=m": Kind(lens=np.array([*LENS[:2], 0.5, 0.5])),
    "off_size.npz#size=video": Kind(refused="principal point .1, 1. outside the picture of frames of 48x64",
                                    but=("sample --trajectory", "data.trajectories")),
    "off_size.npz": Kind(lens=np.array([130 / 128, 130 / 96, 0.5, 0.5])),
    "transforms_gap.json": Kind(refused="frames 4 and 6 are not one even step apart"),
    "bent.json": Kind(refused="corners lie .* off a pinhole's; undistort"),
    "fisheye.json": Kind(refused="OPENCV_FISHEYE is no pinhole"),
    "re10k_gap.txt": Kind(refused="line 6: its time"),
    "several.json#cam05:axes=opengl": Kind(refused="states axes opencv; drop axes=opengl"),
    "re10k.txt#direction=c2w": Kind(refused="states direction w2c; drop direction=c2w"),
    "c2w.npz#direction=w2c": Kind(refused="states direction c2w; drop direction=w2c"),
    "own.npz#unit=cm": Kind(refused="states unit 1.0; drop unit=cm"),
    "own.npz#size=480x640": Kind(refused="states frames of 48x64; drop size=480x640",
                                 but=("sample --trajectory", "data.trajectories")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cameras")
    write_files(folder)
    noise = torch.randint(0, 256, (F, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(folder / "in.mp4", noise, 12.0)
    return folder


Answer = tuple[Any, Any, Any]
"""c2w ``[F, 4, 4]``, lens ``[4]`` or None, plane ``[4]`` or None, as a verb got them from a camera."""


def by_sample(option: str) -> Callable[[Path, str, pytest.MonkeyPatch], Answer]:
    def run(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Answer:
        seen: list[tuple[RetakeBatch, float]] = []
        real = sample.read_inputs
        monkeypatch.setattr(sample, "read_inputs", lambda *a, **k: seen.append(real(*a, **k)) or seen[0])
        given = {"--trajectory": "1"} | {option: name}
        words = ["--model", str(TINY_BASE), "--video", str(folder / "in.mp4"), "--out", str(folder / "out.mp4")]
        asserted(
            main(["sample", *words, "--frames", str(F), "--dry-run", *(w for pair in given.items() for w in pair)])
        )
        if option == "--trajectory":
            return seen[0][0].target_camera.c2w[0], None, None
        source = seen[0][0].source
        plane = source.ground_plane
        return source.camera.c2w[0], source.camera.intrinsics[0, 0], None if plane is None else plane[0]

    return run


def by_score(option: str) -> Callable[[Path, str, pytest.MonkeyPatch], Answer]:
    def run(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Answer:
        seen: list[RetakeBatch] = []

        class Recorder:
            name, keys = "recorder", ("all",)

            def __call__(self, videos: torch.Tensor, batch: RetakeBatch) -> RewardOutput:
                seen.append(batch)
                return RewardOutput({"all": torch.ones(1)}, torch.tensor([True]), {})

        monkeypatch.setattr("geoalign.cli.score._build", lambda kind, options: Recorder())
        given = {"--trajectory": "1", "--evaluator": "mapanything", "--video": str(folder / "in.mp4")} | {option: name}
        asserted(main(["score", *(word for pair in given.items() for word in pair)]))
        if option == "--trajectory":
            return seen[0].target_camera.c2w[0], seen[0].target_camera.intrinsics[0, 0], None
        source = seen[0].source
        plane = source.ground_plane
        return source.camera.c2w[0], source.camera.intrinsics[0, 0], None if plane is None else plane[0]

    return run


def asserted(code: int) -> None:
    if code:
        raise SystemExit(code)


def by_pool(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Answer:
    pool = load_pool(Path(name), F, TrajectoriesConfig(val_fraction=0, layout="files"), Tally("camera paths"))
    return pool.raw(len(pool) - 1).c2w, None, None  # of several cameras the last


def by_clips(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Answer:
    config = DataConfig(num_frames=F, height=SIZE[0], width=SIZE[1], clips=ClipsConfig(stride=1))
    window = ClipLoader(config, PyAVReader()).load(ClipRecord("in", "in", folder / "in.mp4", camera=Path(name)), 0)
    return window.camera.c2w, window.camera.intrinsics[0], window.ground_plane


VERBS = {
    "sample --trajectory": by_sample("--trajectory"), "sample --source-camera": by_sample("--source-camera"),
    "score --trajectory": by_score("--trajectory"), "score --source-camera": by_score("--source-camera"),
    "data.trajectories": by_pool, "data.clips": by_clips,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_camera_is_read_or_refused(
    verb: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name]
    given = str(folder / name)
    if kind.refused and verb not in kind.but:
        with pytest.raises((DataError, SystemExit)) as caught:
            VERBS[verb](folder, given, monkeypatch)
        said = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
        assert re.search(kind.refused, said) and "Traceback" not in said
        if isinstance(caught.value, SystemExit):
            begun, *rest = said.splitlines()
            assert caught.value.code == 1 and begun.endswith(": loading") and len(rest) == 1
        return
    c2w, lens, plane = VERBS[verb](folder, given, monkeypatch)
    # Float32 inside the verbs; nine digits in the ReCamMaster file.
    expected = TRUTH
    if name == "short.npy":  # spread over the video, or as long as it is
        expected = np.linalg.inv(TRUTH[0]) @ np.stack([TRUTH[f] for f in range(5)])
        c2w = c2w[::2] if verb == "sample --trajectory" else c2w
    np.testing.assert_allclose(np.asarray(c2w), expected, atol=2e-6)
    if lens is not None and kind.lens is not None:
        np.testing.assert_allclose(np.asarray(lens), kind.lens, atol=1e-6)
    if verb.endswith("source-camera") or verb == "data.clips":
        assert (plane is None) == (kind.plane is None)
        if kind.plane is not None:
            np.testing.assert_allclose(np.asarray(plane), kind.plane, atol=1e-6)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.startswith("data")])
def test_presets_stand_for_cameras(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers are those of test_presets.py, at the length of the video."""
    c2w, _, plane = VERBS[verb](folder, "arc_left", monkeypatch)
    assert plane is None
    torch.testing.assert_close(c2w.float(), preset("arc_left", F).c2w, atol=1e-6, rtol=0)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        VERBS[verb](folder, "arc_lift", monkeypatch)
    assert "did you mean 'arc_left'" in capsys.readouterr().err


def test_scale_free_files_are_no_metric_camera_of_a_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published Sekai files are scale-free and say so by silence; training asks for metres, a target is rescaled."""
    with pytest.raises(DataError, match="no metric camera file"):
        by_clips(folder, str(folder / "scale_free.npz"), monkeypatch)
    np.testing.assert_allclose(by_pool(folder, str(folder / "scale_free.npz"), monkeypatch)[0], TRUTH, atol=1e-9)


def test_a_path_of_five_poses_scores_five_frames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(by_score("--trajectory")(folder, str(folder / "short.npy"), monkeypatch)[0]) == 5


def test_a_sampled_retake_is_scored_on_its_own_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `sample` writes goes back into `score` and `sample`, and its source follows the original's crop."""
    out = tmp_path / "out.mp4"
    words = ["--model", str(TINY_BASE), "--video", str(folder / "in.mp4"), "--source-camera", str(folder / "plane.npz")]
    words += ["--trajectory", "arc_right", "--speed", "0.5", "--steps", "2", "--frames", "5", "--size", "48x48"]
    assert main(["sample", *words, "--out", str(out)]) == 0  # a geometric model: the plane is that of the file
    asked = preset("arc_right", 5, speed=0.5).c2w
    record = str(out.with_suffix(".json"))
    for verb in ("sample --trajectory", "score --trajectory"):
        with monkeypatch.context() as patch:
            again = VERBS[verb](folder, record, patch)[0]
        # Nine frames were asked of `sample`: five poses are spread over them.
        torch.testing.assert_close(again[:: (len(again) - 1) // 4].float(), asked, atol=1e-6, rtol=0)
    for verb in ("sample --source-camera", "score --source-camera"):
        with monkeypatch.context() as patch:
            refused = pytest.raises(SystemExit, match="1")
            with refused:  # five poses for nine frames
                VERBS[verb](folder, f"{record}#source", patch)
    source = open_camera(f"{record}#source", image_size=SIZE)
    np.testing.assert_allclose(source.path.c2w.numpy(), TRUTH[:5], atol=1e-6)
    np.testing.assert_allclose(source.path.intrinsics[0].numpy(), LENS, atol=1e-6)
    assert source.ground_plane is not None
    np.testing.assert_allclose(source.ground_plane.numpy(), PLANE, atol=1e-6)


def test_a_length_is_asked_of_files_and_presets_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("arc_left", str(folder / "own.npz")):
        video, batch, found = read_condition(name, None, None, None, None, 4).read(folder / "in.mp4")
        assert video.shape[1] == batch.target_camera.num_frames == 4 and found == F
    for frames, words in ((1, "no motion to score"), (12, "9 poses, 12 are needed")):
        with pytest.raises(UserError, match=words):
            read_condition(str(folder / "own.npz"), None, None, None, None, frames)


def test_the_help_names_every_format_once_for_all_verbs() -> None:
    for known in FORMATS:
        assert known.name.split()[0] in CAMERA_HELP or known.holds.split()[0] in CAMERA_HELP
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers()
    for module in (sample_cli, score_cli):
        module.add_parser(verbs, "")
    for name in ("sample", "score"):
        options = {action.dest: action.help for action in verbs.choices[name]._actions}
        assert CAMERA_HELP in options["trajectory"]
