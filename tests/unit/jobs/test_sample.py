"""`geoalign sample` end to end on CPU: an mp4 and a frame folder, two codecs, guidance, and every refusal."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation, Slerp
from sealed_files import unsealed

from geoalign.cli.main import main
from geoalign.config.model import ModelConfig
from geoalign.data.video import PyAVReader, write_video
from geoalign.evaluators.base import PoseEstimate
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.presets import preset
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.sample import with_estimated_camera
from geoalign.models.dit import RetakeDiT
from geoalign.policy.formats import save_pretrained
from geoalign.policy.open import ModelFiles
from geoalign.policy.retake import retake
from geoalign.rewards.registry import build_evaluator
from geoalign.types import RetakeBatch, SourceClip

RECAM = ModelConfig(
    dim=48, heads=2, layers=2, ffn_dim=64, text_dim=16, freq_dim=32, source="frames", camera="modulated",
    rope_layout="sequential", text_length=1,
)  # fmt: skip


USED = ("camera_file", "source_camera", "source_estimator", "negative_prompt")
TINY_BASE = Path(str(resources.files("geoalign"))) / "_assets" / "tiny_base.safetensors"


def moving_picture(frames: int, height: int, width: int) -> torch.Tensor:
    """uint8 ``[F, H, W, 3]``: a coloured gradient that slides."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pictures = [torch.stack([(x + 0.05 * i) % 1, y, 1 - x], -1) for i in range(frames)]
    return (torch.stack(pictures) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random transformer and a random Wan VAE."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    save_pretrained(RetakeDiT(RECAM), folder)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "in.mp4"
    write_video(path, moving_picture(9, 50, 70), 12.0)
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every video that is sampled, before its encoding: x264 does not give the same bytes for the same frames."""
    videos: list[torch.Tensor] = []

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        videos.append(retake(*args, **options))
        return videos[-1]

    monkeypatch.setattr("geoalign.policy.retake.retake", recorded)
    return videos


def run(model: Path, video: Path, out: Path, *more: str) -> int:
    arguments = ["--model", str(model), "--video", str(video), "--out", str(out), "--size", "32x48", "--steps", "2"]
    if "--trajectory" not in more:
        arguments += ["--trajectory", "pan_right"]
    return main(["sample", *arguments, *more])


def test_mp4_end_to_end(model: Path, clip: Path, tmp_path: Path, made: list[torch.Tensor]) -> None:
    out = tmp_path / "made" / "out.mp4"
    assert run(model, clip, out, "--speed", "1.5", "--frames", "5") == 0
    info = PyAVReader().probe(out)
    assert (info.frames, info.height, info.width, info.fps) == (5, 32, 48, 12.0)
    beside = PyAVReader().probe(out.with_name("out.side_by_side.mp4"))
    assert (beside.frames, beside.width) == (5, 96)
    record = json.loads(out.with_name("out.json").read_text("utf-8"))
    expected = preset("pan_right", 5, speed=1.5).c2w
    torch.testing.assert_close(torch.tensor(record["target_c2w"]), expected, atol=1e-6, rtol=0)
    assert record["arguments"]["seed"] == 0 and record["forwards"] == 2
    with Image.open(out.with_name("out.cameras.png")) as picture:
        assert picture.width > 400
    assert run(model, clip, tmp_path / "again.mp4", "--speed", "1.5", "--frames", "5") == 0
    assert torch.equal(made[0], made[1])


def test_frame_folder_with_odd_sizes_and_camera_file(model: Path, tmp_path: Path) -> None:
    """A DAVIS-style folder; pictures of odd size are scaled and cropped; the target comes from a file."""
    folder = tmp_path / "bear"
    folder.mkdir()
    for index, picture in enumerate(moving_picture(6, 51, 71).numpy()):
        Image.fromarray(picture).save(folder / f"{index:05d}.jpg")
    poses = torch.eye(4).repeat(5, 1, 1)
    poses[:, 2, 3] = torch.linspace(0, 1, 5)
    np.save(tmp_path / "path.npy", poses.numpy())
    out = tmp_path / "out.mp4"
    assert run(model, folder, out, "--trajectory", str(tmp_path / "path.npy")) == 0
    record = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert record["used"]["frames"] == 5  # the longest 4k + 1 of six
    assert record["target_c2w"][4][2][3] == pytest.approx(1.0)


def test_policy_file_of_the_embedded_default(tmp_path: Path) -> None:
    clip = tmp_path / "in.mp4"
    write_video(clip, moving_picture(5, 48, 64), 12.0)
    out, plane = tmp_path / "out.mp4", ("--ground-plane", "0,0.342,0.94,10")
    assert run(TINY_BASE, clip, out, "--size", "48x64") == 2  # geometric phases need the plane
    assert not out.exists()
    assert run(TINY_BASE, clip, out, "--size", "48x64", *plane) == 0
    # bfloat16, the default on CUDA, has 8 bits of mantissa: a level or two of 255 away from float32 after two steps.
    half = tmp_path / "half.mp4"
    assert run(TINY_BASE, clip, half, "--size", "48x64", "--dtype", "bfloat16", *plane) == 0
    videos = [PyAVReader().read(path, range(5)).float() for path in (out, half)]
    assert (videos[0] - videos[1]).abs().mean() < 4
    # Frame 0 is given: up to the video coding of both files it is the source's.
    made, source = (PyAVReader().read(path, [0]).float() for path in (out, clip))
    assert (made - source).abs().mean() < 8


def test_exported_policy_samples_the_same_video(clip: Path, tmp_path: Path, made: list[torch.Tensor]) -> None:
    """The patch codec travels with an export; a damaged or missing one is named."""
    folder, plane = tmp_path / "exported", ("--ground-plane", "0,0.342,0.94,10", "--size", "48x64", "--frames", "5")
    assert main(["export", "--format", "diffusers", "--model", str(TINY_BASE), "--out", str(folder)]) == 0
    for name, model in (("file", TINY_BASE), ("folder", folder)):
        assert run(model, clip, tmp_path / f"{name}.mp4", *plane) == 0
    assert torch.equal(made[0], made[1])
    again = tmp_path / "again"
    assert main(["export", "--format", "diffusers", "--model", str(folder), "--out", str(again)]) == 0
    tensors = {"config.json", "diffusion_pytorch_model.safetensors", "codec.safetensors"}
    assert {file.name for file in folder.iterdir()} == tensors | {"README.md"}
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    for name in tensors - {"config.json"}:  # headers list their metadata in any order
        with safe_open(folder / name, framework="pt") as first, safe_open(again / name, framework="pt") as second:
            assert first.metadata() == second.metadata() and sorted(first.keys()) == sorted(second.keys())
            assert all(torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"model": '{"dim": "wide"}'}, "invalid model settings in its header (dim: "),
        ({"model": "{"}, "invalid model settings in its header (Invalid JSON"),
        ({"codec": None}, "its header holds no codec settings"),
        ({"codec": "{"}, "invalid codec settings in its header (Invalid JSON"),
        ({"codec": '{"luma": 4}'}, "is not a geoalign codec"),
        ({"codec": '{"patch": 15}'}, "need an even patch"),
        ({"codec": '{"kind": "wan_vae"}'}, "its autoencoder is the Wan VAE"),
    ],
)
def test_damaged_headers_of_policy_files_are_named(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], header: dict[str, str | None], said: str
) -> None:
    with safe_open(TINY_BASE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no __iter__
        wanted = {key: value for key, value in (unsealed(file.metadata()) | header).items() if value is not None}
    save_file(tensors, tmp_path / "bad.safetensors", wanted)
    assert run(tmp_path / "bad.safetensors", clip, tmp_path / "out.mp4", "--size", "48x64") in (1, 2)
    message = capsys.readouterr().err
    began, message = message.splitlines()
    assert began.endswith(" sample: loading") and said in message and "pydantic" not in message


def test_a_torch_file_is_no_policy(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    assert run(tmp_path / "model.pt", clip, tmp_path / "out.mp4") == 1
    assert "not a geoalign policy file" in capsys.readouterr().err


def test_dry_run_writes_nothing(model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, clip, tmp_path / "out.mp4", "--dry-run") == 0
    text = capsys.readouterr().out
    # Nine frames make three latent frames of 4 x 6; patches of 2 x 2; source and target: 2 * 3 * 2 * 3 tokens.
    assert "16 x 3 x 4 x 6" in text and "36 tokens" in text and "predicted" in text
    assert list(tmp_path.iterdir()) == []


def test_tiled_reaches_the_autoencoder(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan

    calls: list[object] = []
    monkeypatch.setattr(AutoencoderKLWan, "enable_tiling", lambda vae: calls.append(vae))
    assert run(model, clip, tmp_path / "out.mp4", "--frames", "5") == 0 and not calls
    assert run(model, clip, tmp_path / "out.mp4", "--frames", "5", "--tiled") == 0 and len(calls) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--video none.mp4", "none.mp4"),
        ("--trajectory none.json", "none.json"),
        ("--out retake.txt", ".mp4"),
        ("--out /proc/none/out.mp4", "cannot be written"),
        ("--negative-prompt @none.txt", "drop --negative-prompt"),  # the model reads none
        ("--source-estimator mapanything --estimator-weights none", "hf download facebook/map-anything-apache"),
        (
            "--best-of 2 --reward hpsv3 --set checkpoint=HPSv3.safetensors --set tokenizer=none",
            "hf download MizzenAI/HPSv3",
        ),
        ("--best-of 2 --reward geometry --set evaluator=planar", "ground plane"),
    ],
)
def test_inputs_are_refused_before_a_model_is_loaded(
    options: str, words: str, model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("network", "codec"):
        monkeypatch.setattr(ModelFiles, name, loaded)
    monkeypatch.chdir(tmp_path)
    assert run(model, clip, Path("out.mp4"), *options.split()) in (1, 2)
    error = capsys.readouterr().err
    began, error = error.splitlines()
    assert began.endswith(" sample: loading") and words in error
    assert run(model, clip, Path("out.mp4")) == 1 and "a model was loaded" in capsys.readouterr().err


def test_the_bar_covers_decoding(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run(model, clip, tmp_path / "out.mp4", "--frames", "5") == 0
    said = capsys.readouterr().err
    assert "sampling" in said and said.rstrip().split("\r")[-1].startswith("decoding: 100%") and "3/3" in said


def test_camera_of_the_source_by_an_evaluator(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in registered evaluator: what it is given, and that its poses are used, re-based to frame 0."""
    clip = tmp_path / "in.mp4"
    write_video(clip, moving_picture(5, 32, 48), 12.0)
    c2w = torch.eye(4).repeat(5, 1, 1)
    c2w[:, 0, 3] = torch.tensor([1.0, 1.5, 2.5, 3.0, 4.0])
    seen: dict[str, object] = {}

    class StandIn:
        name = "planar"

        def __init__(self, reference: str) -> None:
            seen["reference"] = reference

        def __call__(self, video: torch.Tensor, source: SourceClip) -> PoseEstimate:
            seen["source"], seen["same"] = source, torch.equal(video, source.video)
            return PoseEstimate(c2w[None] * seen.get("factor", 1.0), torch.arange(5), torch.ones(1), torch.zeros(1))

    monkeypatch.setattr("geoalign.evaluators.planar.PlanarAligner", StandIn)
    plane = ("--ground-plane", "0,2,0,3", "--intrinsics", "0.9,1.2,0.5,0.5")
    assert run(model, clip, tmp_path / "out.mp4", "--source-estimator", "planar", *plane) == 0
    assert "estimated by planar: a path of 3 m, 100% tracked" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [pose[0][3] for pose in record["source_c2w"]] == [0.0, 0.5, 1.5, 2.0, 3.0]
    assert record["intrinsics"][0] == pytest.approx(0.9)
    source = seen["source"]
    assert isinstance(source, SourceClip) and source.ground_plane is not None
    # The source is aligned to its first frame; the plane is normalised: 2y = 3 is y = 1.5.
    assert seen["reference"] == "first" and seen["same"] and source.ground_plane.tolist() == [[0, 1, 0, 1.5]]
    assert [record["used"][name] for name in USED] == [None, None, "planar", None]
    beside = tmp_path / "in.npz"
    write_clip_camera(beside, preset("pan_right", 5), (32, 48), ground_plane=torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert run(model, clip, tmp_path / "lens.mp4", "--source-estimator", "planar") == 0
    assert f"camera   lens, ground plane from {beside}" in capsys.readouterr().out
    record = json.loads((tmp_path / "lens.json").read_text("utf-8"))
    assert [record["used"][name] for name in USED] == [str(beside), None, "planar", None]
    assert run(model, clip, tmp_path / "found.mp4") == 0
    record = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [record["used"][name] for name in USED] == [str(beside), str(beside), None, None]
    seen["factor"] = float("nan")
    assert run(model, clip, tmp_path / "nan.mp4", "--source-estimator", "planar") == 1
    assert "give --source-camera instead" in capsys.readouterr().err
    both = ("--source-estimator", "planar", "--source-camera", str(clip))
    assert run(model, clip, tmp_path / "nan.mp4", *both) == 2
    assert run(model, clip, tmp_path / "nan.mp4", "--source-estimator", "mapanything") == 2
    assert not (tmp_path / "nan.mp4").exists()


def test_planar_estimator_reads_a_known_motion() -> None:
    """A camera that slides 0.4 m above a textured plane 2 m below, rendered in closed form; 2 cm allowed."""
    height, width, frames = 64, 96, 5
    lens, plane = (0.8, 1.2, 0.5, 0.5), torch.tensor([[0.0, 0.6, 0.8, 2.0]])
    v, u = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    rays = torch.stack([(u - 0.5) / lens[0], (v - 0.5) / lens[1], torch.ones_like(u)], -1)
    ground = rays * (2.0 / (rays @ plane[0, :3]))[..., None]
    c2w = torch.eye(4).repeat(frames, 1, 1)
    c2w[:, 0, 3] = torch.linspace(0, 0.4, frames)  # along the plane: distances to it do not change
    pictures = []
    for step in c2w[:, 0, 3]:
        x, y = ground[..., 0] + step, ground[..., 1]
        pictures.append(0.4 * (2.1 * x + y).sin() + 0.3 * (3.3 * y - 1.2 * x).cos() + 0.2 * (5 * x).sin())
    video = torch.stack(pictures)[None, :, None].expand(1, frames, 3, height, width)
    still = CameraTrajectory.stack([CameraTrajectory.identity(frames, lens)])
    batch = RetakeBatch(SourceClip(video, still, plane, ("source",)), still, ("",))
    found, tracked = with_estimated_camera(batch, build_evaluator("planar", reference="first"))
    assert tracked > 0.7
    torch.testing.assert_close(found.source.camera.position[0], c2w[:, :3, 3], atol=0.02, rtol=0)
    torch.testing.assert_close(found.source.camera.intrinsics, still.intrinsics)


def turning_path(frames: int) -> torch.Tensor:
    """``[F, 4, 4]`` float64 from the identity: turns about all axes and moves along a curve, unevenly."""
    time = np.linspace(0, 1, frames)
    vectors = np.stack([0.9 * time**2, 0.7 * np.sin(3 * time), 0.8 * time], -1)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(vectors).as_matrix()
    poses[:, :3, 3] = np.stack([np.sin(2 * time), time**3, 1.5 * time], -1)
    return torch.from_numpy(poses)


def target_of(model: Path, clip: Path, out: Path, poses: torch.Tensor, *more: str) -> np.ndarray:
    """The target path ``[9, 4, 4]`` that a run of nine frames used for a camera file with ``poses``."""
    np.save(out.with_suffix(".npy"), poses.numpy())
    assert run(model, clip, out, "--trajectory", str(out.with_suffix(".npy")), *more) == 0
    return np.array(json.loads(out.with_suffix(".json").read_text("utf-8"))["target_c2w"])


def test_a_camera_file_keeps_its_shape_at_any_length_and_speed(model: Path, clip: Path, tmp_path: Path) -> None:
    """Against scipy: slerp and linear positions at the new times; speed multiplies every step of the body frame."""
    long, short = turning_path(12), turning_path(6)
    first = target_of(model, clip, tmp_path / "long.mp4", long)
    np.testing.assert_allclose(first, long[:9], atol=1e-6)
    spread = target_of(model, clip, tmp_path / "short.mp4", short)
    times, new = np.arange(6.0), np.linspace(0, 5, 9)
    expected = Slerp(times, Rotation.from_matrix(short[:, :3, :3].numpy()))(new).as_matrix()
    np.testing.assert_allclose(spread[:, :3, :3], expected, atol=1e-6)
    places = np.stack([np.interp(new, times, short[:, i, 3].numpy()) for i in range(3)], -1)
    np.testing.assert_allclose(spread[:, :3, 3], places, atol=1e-6)
    for name, poses in (("long", first), ("short", spread)):
        fast = target_of(
            model, clip, tmp_path / f"{name}_fast.mp4", long if name == "long" else short, "--speed", "1.5"
        )
        np.testing.assert_allclose(fast[0], np.eye(4), atol=1e-7)
        for slow_step, fast_step in zip(steps(poses), steps(fast), strict=True):
            np.testing.assert_allclose(fast_step, 1.5 * slow_step, atol=2e-6)


def steps(poses: np.ndarray) -> list[np.ndarray]:
    """Rotation vector and move of each step in the frame of the camera before it, by numpy and scipy."""
    moves = [np.linalg.inv(a) @ b for a, b in itertools.pairwise(poses)]
    return [np.concatenate([Rotation.from_matrix(m[:3, :3]).as_rotvec(), m[:3, 3]]) for m in moves]


@pytest.mark.parametrize("part", ["transformer", "codec"])
def test_results_that_are_not_finite_are_refused(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """A NaN weight, and NaN in the codec alone: exit 1, one line, no file."""
    name = {"transformer": "model.head.head.weight", "codec": "codec.channel_std"}[part]
    with safe_open(TINY_BASE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no __iter__
        save_file(
            tensors | {name: torch.full_like(tensors[name], torch.nan)},
            tmp_path / "bad.safetensors",
            unsealed(file.metadata()),
        )
    out = tmp_path / "out" / "out.mp4"
    assert run(tmp_path / "bad.safetensors", clip, out, "--size", "48x64", "--ground-plane", "0,0.342,0.94,10") == 1
    message = capsys.readouterr().err
    assert "NaN or infini" in message and "Traceback" not in message
    assert not out.parent.exists()


def test_outputs_are_checked_before_sampling(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("geoalign.policy.retake.retake", lambda *_, **__: pytest.fail("sampled before the check"))
    (tmp_path / "file").touch()
    assert run(model, clip, tmp_path / "file" / "out.mp4") == 1
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "out.cameras.png").mkdir()
    assert run(model, clip, tmp_path / "out.mp4") == 2
    assert "out.cameras.png is a folder" in capsys.readouterr().err


def test_refusals_are_one_line_and_write_nothing(
    model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "empty.mp4").write_bytes(b"")
    (inputs / "short.mp4").write_bytes(clip.read_bytes()[:300])
    poses = torch.eye(4).repeat(9, 1, 1).numpy()
    np.save(inputs / "mirror.npy", poses * np.diag([-1, 1, 1, 1]))
    np.save(inputs / "nan.npy", np.where(np.arange(9)[:, None, None] == 4, np.nan, poses))
    (inputs / "cut.json").write_text('{"c2w": [', "utf-8")
    out = tmp_path / "out" / "out.mp4"
    cases = [
        (1, clip.with_name("none.mp4"), ()),
        (1, inputs / "empty.mp4", ()),
        (1, inputs / "short.mp4", ()),
        (1, clip, ("--trajectory", str(inputs / "mirror.npy"))),
        (1, clip, ("--trajectory", str(inputs / "nan.npy"))),
        (1, clip, ("--trajectory", str(inputs / "cut.json"))),
        (2, clip, ("--trajectory", "pan_rigth")),
        (2, clip, ("--frames", "6")),
        (2, clip, ("--frames", "13")),
        (2, clip, ("--size", "33x48")),
        (2, clip, ("--size", "0x0")),
        (2, clip, ("--speed", "0")),
        (2, clip, ("--speed", "inf")),
        (2, clip, ("--speed", "nan")),
        (2, clip, ("--intrinsics", "0,0,.5,.5")),
        (2, clip, ("--intrinsics", "nan,1,.5,.5")),
        (2, clip, ("--intrinsics", "1,1,.5,inf")),
        (2, clip, ("--guidance", "5")),
        (2, clip, ("--steps", "0")),
        (2, clip, ("--shift", "-1")),
        (2, clip, ("--device", "foo")),
        (2, clip, ("--device", "meta")),
        (2, clip, ("--device", "cuda:99")),
        (1, clip, ("--checkpoint", str(clip))),
    ]
    for code, video, more in cases:
        assert run(model, video, out, *more) == code, more
        message = capsys.readouterr().err
        assert message.count("error:") == 1 and "Traceback" not in message and "pydantic" not in message, message
    assert not out.parent.exists()
