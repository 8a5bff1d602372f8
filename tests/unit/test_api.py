"""The Python verbs: what they refuse is a UserError in Python's words, found before anything is made, never ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import geoalign
from geoalign import RetakePolicy, UserError, build_reward, load_trajectory, score, train
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.data.video import write_video
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.presets import preset
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs import encode
from geoalign.policy import retake as sampling

F, H, W = 5, 48, 64
PLANE = (0.0, 0.342, 0.94, 10.0)


@pytest.fixture(scope="module")
def policy() -> RetakePolicy:
    return RetakePolicy.from_pretrained("builtin:tiny_base")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A clip with its camera, one without, and what is no video."""
    pixels = torch.rand(F, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("clip", "bare"):
        write_video(tmp_path / f"{name}.mp4", pixels, 12.0)
    write_clip_camera(tmp_path / "clip.npz", preset("pan_right", F), (H, W), ground_plane=torch.tensor(PLANE))
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    (tmp_path / "cut.json").write_text('{"c2w": [', "utf-8")
    return tmp_path


def refused(call: Callable[[], object], *words: str) -> None:
    """It is, by one line that holds the words and no option of the command line."""
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and not {word for word in said.split() if word.startswith("--")}, said
    assert all(word in said for word in words), said


NAMES = (None, 5, b"x", "", "a\0b", "/none/there")
NO_NUMBER = ("2", None, float("nan"), float("inf"), 0, -1, True, 1j)
NO_WHOLE = ("2", None, 2.5, -1, True, 10**30, 1j)
NO_FOUR = ("1,1,1,1", 5, (1, 1, 0.5), (1, 1, 0.5, 0.5, 1), (1, 1, 0.5, "x"), (1, 1, 0.5, float("nan")))
PATHS: tuple[Any, ...] = (
    *NAMES, "arc_lfet", CameraTrajectory.build(torch.eye(4).repeat(2, F, 1, 1)),
    CameraTrajectory.build(torch.full((F, 4, 4), float("nan"))),
    CameraTrajectory.build(torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).repeat(F, 1, 1)),
)  # fmt: skip
RETAKE: dict[str, tuple[Any, ...]] = {
    "video": (*NAMES, "cut.mp4"),
    "path": (*PATHS, "cut.json"),
    "speed": (*NO_NUMBER, 1e30),
    "frames": tuple(value for value in (*NO_WHOLE, 0, F + 1) if value is not None),
    "size": ("48x64", 48, (48,), (48, 64, 3), (0, 0), (48.0, 64.0), (15, 64), (49, 64), (True, True)),
    "source_camera": (*NAMES[1:], "cut.json", "arc_lfet"),
    "intrinsics": (*NO_FOUR, (0, 1, 0.5, 0.5), (700, 700, 416, 240)),
    "ground_plane": (*NO_FOUR, (0, 0, 0, 1), (0, 0, 1, -1)),
    "prompt": (5, "a street", ""),  # this model reads no text
    "negative_prompt": (5, "blurred", ""),
    "guidance": (*(value for value in NO_NUMBER if value is not None), 5.0),
    "steps": (None, 2.5, -1, True, 1j, 0, 1),
    "shift": tuple(value for value in NO_NUMBER if value not in ("2", True)),
    "seed": NO_WHOLE,
}


def test_every_argument_of_a_retake_is_looked_at(
    policy: RetakePolicy, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(sampling, "retake", lambda *_, **__: pytest.fail("sampled before it was refused"))
    sound = {"video": "clip.mp4", "path": "zoom_in", "steps": 2}
    assert RETAKE.keys() == set(RetakePolicy.retake.__wrapped__.__code__.co_varnames[1:15])  # type: ignore[attr-defined]
    for name, values in RETAKE.items():
        for value in values:
            refused(lambda given=sound | {name: value}: policy.retake(**given))
    refused(lambda: policy.retake("clip.mp4", "zoom_in", steps=1), "steps=1")
    refused(lambda: policy.retake("clip.mp4", "zoom_in", guidance=5.0), "guidance=5.0", "use guidance=1")


def test_texts_that_would_have_no_effect_are_refused() -> None:
    def choose(**given: Any) -> float:
        return encode.choose_guidance(given.pop("guidance", None), given.pop("reads", True), "m", **given)

    assert choose(prompt="a") == 5 and choose(captioned=True, guidance=1.0) == 1 and choose(reads=False) == 1
    for given, word in (
        ({}, "--prompt"), ({"reads": False, "prompt": ""}, "drop --prompt"),
        ({"reads": False, "captioned": True}, "drop --captioner"),
        ({"reads": False, "negative_prompt": ""}, "drop --negative-prompt"),
        ({"guidance": 0.0, "prompt": "a"}, "above 0"),
        ({"prompt": "a", "guidance": 1.0, "negative_prompt": "b"}, "--negative-prompt"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            choose(**given)


def test_models_and_places_are_looked_at(policy: RetakePolicy, files: Path) -> None:
    base = "builtin:tiny_base"
    for path in (*NAMES, "builtin:none", files / "clip.mp4", files):
        refused(lambda path=path: RetakePolicy.from_pretrained(path))
    for delta in (*NAMES[1:], files / "clip.mp4"):
        refused(lambda delta=delta: RetakePolicy.from_pretrained(base, delta=delta))
    for device in (None, 5, "gpu", "cuda:99", "meta"):
        refused(lambda device=device: RetakePolicy.from_pretrained(base, device=device), "device")
    for dtype in ("float32", None, torch.int32, torch.bool, torch.complex64):
        refused(lambda dtype=dtype: RetakePolicy.from_pretrained(base, dtype=dtype), f"dtype={dtype}")
    for folder in (*NAMES[:-1], files, files / "clip.mp4", files / "clip.mp4" / "deeper"):
        refused(lambda folder=folder: policy.save_pretrained(folder))


def test_a_retake_is_saved_with_what_it_was_made_with(policy: RetakePolicy, files: Path) -> None:
    made = policy.retake(files / "clip.mp4", "zoom_in", steps=2, ground_plane=PLANE, seed=np.int64(3))
    for out in (*NAMES[:-1], "out.avi", files / "clip.mp4" / "out.mp4"):
        refused(lambda out=out: made.save(out))
    (files / "folder.mp4").mkdir()
    refused(lambda: made.save(files / "folder.mp4"), "is a folder")
    made.save(files / "out.mp4")
    record = json.loads((files / "out.json").read_text("utf-8"))
    asked = {"video": str(files / "clip.mp4"), "trajectory": "zoom_in", "steps": 2, "seed": 3, "guidance": None}
    assert asked.items() <= record["arguments"].items() and record["arguments"]["ground_plane"] == list(PLANE)
    camera = str(files / "clip.npz")
    used = {"guidance": 1.0, "prompt": None, "negative_prompt": None, "source_estimator": None, "fps": 12.0}
    assert (used | {"camera_file": camera, "source_camera": camera, "frames": F}).items() <= record["used"].items()


def test_paths_are_looked_at(files: Path) -> None:
    for name in (*NAMES, "arc_lfet", files / "cut.json", files / "clip.mp4"):
        refused(lambda name=name: load_trajectory(name, frames=F))
    for frames in (*(value for value in NO_WHOLE if value is not None), 0):
        refused(lambda frames=frames: load_trajectory("zoom_in", frames=frames), f"frames={frames!r}")
    for speed in NO_NUMBER:
        refused(lambda speed=speed: load_trajectory("zoom_in", frames=F, speed=speed), f"speed={speed!r}")
    refused(lambda: load_trajectory("zoom_in"), "give frames=N")


SCORE: dict[str, tuple[Any, ...]] = {
    "videos": (*NAMES, [], ["clip.mp4", "none.mp4"], [5], "cut.mp4"),
    "target": (*PATHS, "cut.json"),
    "reward": (None, 5, "geometri", "none.there:Reward", object()),
    "options": (5, {5: 1}, {"evaluator": "plannar"}, {"translation_bond": 1}, {"translation_bound": "x"}),
    "source": (*NAMES[1:], "cut.mp4"),
    "source_camera": (*NAMES[1:], "cut.json", "arc_lfet"),
    "frames": (*(value for value in NO_WHOLE if value is not None), 0, 1, 99),
    "size": RETAKE["size"][:7],
}


def test_every_argument_of_a_score_is_looked_at(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    sound = {"videos": "clip.mp4", "target": "zoom_in", "source": "clip.mp4"}
    assert score(**sound)[0]["frames"] == F  # so that each is refused for what is wrong with it
    assert SCORE.keys() == set(score.__wrapped__.__code__.co_varnames[:8])  # type: ignore[attr-defined]
    for name, values in SCORE.items():
        for value in values:
            refused(lambda given=sound | {name: value}: score(**given))
    built = build_reward("geometry", {"evaluator": "planar"})
    refused(lambda: score(**sound, reward=built, options={"evaluator": "flow_pnp"}), "geoalign.build_reward")
    # Compared with its own first frame it would seem to stand still: as the verb, it wants the source.
    for reward in ("geometry", built):
        given = {"reward": reward, "source_camera": "clip.npz"}
        refused(lambda given=given: score("bare.mp4", "zoom_in", **given), "source=FILE")
    refused(lambda: score("bare.mp4", "zoom_in"), "source=FILE and source_camera=FILE", '{"evaluator": "mapanything"')


def test_who_asks_for_more_frames_than_there_are_is_named(files: Path) -> None:
    video, camera, longer = (str(files / name) for name in ("bare.mp4", "clip.npz", "longer.npy"))
    np.save(longer, preset("zoom_in", 9).c2w.numpy())
    sound = {"videos": video, "source": files / "clip.mp4", "source_camera": camera}
    refused(lambda: score(**sound, target="zoom_in", frames=9), "fewer than frames=9; use frames=5")
    refused(lambda: score(**sound, target=longer), f"fewer than the 9 poses of {longer}; use frames=5")
    pixels = torch.rand(9, 3, H, W) * 2 - 1
    write_video(files / "long.mp4", pixels, 12.0)
    given = sound | {"videos": files / "long.mp4"}
    said = f"clip.mp4: {F} frames, fewer than the 9 of {files / 'long.mp4'}; use frames={F}"
    refused(lambda: score(**given, target="zoom_in"), said)
    write_video(files / "still.mp4", pixels[:1], 12.0)
    refused(lambda: score(**sound | {"videos": files / "still.mp4"}, target="zoom_in"), "no motion to score")


def test_a_training_that_cannot_begin_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr("geoalign.jobs.train._run", lambda *_: pytest.fail("it began"))
    for config in (*NAMES, "tiny_cpuu", "clip.mp4"):
        refused(lambda config=config: train(config))
    for override in (5, None, "train.iteration=1", "train.iterations=x", "nothing"):
        refused(lambda override=override: train("smoke", override))
    refused(lambda: train(load_config(Config, "smoke"), "train.iterations=1"))
    for resume in (5, "", b"auto"):
        refused(lambda resume=resume: train("smoke", resume=resume))


def test_what_is_said_to_a_command_line_stays_its_own() -> None:
    from geoalign.errors import argument, told_in_python

    with pytest.raises(UserError, match="frames=N"):
        load_trajectory("zoom_in")
    assert argument("source_camera", "FILE") == "--source-camera FILE"
    with told_in_python(), told_in_python():
        assert argument("source_camera", "FILE") == "source_camera=FILE"
    assert argument("frames") == "--frames" and geoalign.load_trajectory.__doc__
