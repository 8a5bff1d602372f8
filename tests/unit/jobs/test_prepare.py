"""``geoalign prepare`` end to end: tiny random Wan VAE, umT5, CLIP and BLIP-2 in the published folder formats."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from tiny_captioner import save_tiny_blip2
from torch import Tensor

from geoalign.cli.main import main
from geoalign.config.data import DataConfig
from geoalign.config.load import load_config
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.data.cache import settings_hash
from geoalign.data.frames import to_float
from geoalign.data.prepare import PrepareReport, data_settings
from geoalign.data.source import RetakeDataset
from geoalign.errors import DataError, RunError
from geoalign.evaluators.base import PoseEstimate
from geoalign.files.digest import content_hash
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs import prepare as encoders
from geoalign.jobs.prepare import encoder_identity, every_frame, render_missing_data
from geoalign.jobs.progress import bytes_text
from geoalign.models.captions import load_captioner
from geoalign.models.dit import RetakeDiT
from geoalign.models.encoders import load_image_encoder, load_text_encoder
from geoalign.models.wan_vae import load_wan_codec
from geoalign.policy.open import open_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.registry import EVALUATORS
from geoalign.types import Encodings, SourceClip

WORDS = ("a", "bear", "walks", "past", "rocks", "river", "street", "tree", "two", "dogs", "red", "car")
TEXT_DIM, IMAGE_DIM, TEXT_LENGTH = 16, 20, 8
STEP_M = 0.25


class LineEvaluator:
    """Sees every camera move forward by a quarter of a metre and turn by two degrees a frame; looks at every other."""

    name = "line"

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        index = torch.arange(0, video.shape[1], 2)
        c2w = torch.eye(4).repeat(1, len(index), 1, 1)
        c2w[0, :, 2, 3] = STEP_M * index
        turn = torch.deg2rad(2.0 * index)
        c2w[0, :, 0, 0], c2w[0, :, 0, 2] = turn.cos(), turn.sin()
        c2w[0, :, 2, 0], c2w[0, :, 2, 2] = -turn.sin(), turn.cos()
        return PoseEstimate(c2w, index, torch.ones(1), torch.zeros(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``vae``, ``text``, ``tokenizer``, ``image`` and ``blip2``."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5Config,
        UMT5EncoderModel,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(folder / "vae")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    text = UMT5Config(
        vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    UMT5EncoderModel(text).save_pretrained(folder / "text")
    image = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(image).save_pretrained(folder / "image")
    save_tiny_blip2(folder / "blip2")
    return folder


def settings_file(world: DataConfig, weights: Path, **prepare: Any) -> Path:
    """A configuration file that prepares ``world`` with all encoders."""
    stored = {
        "dtype": "float32", "text_length": TEXT_LENGTH, "evaluator": "line",
        **{"codec": "vae", "text": "text", "tokenizer": "tokenizer", "image": "image", "captioner": "blip2"}, **prepare,
    }  # fmt: skip
    for name in ("codec", "text", "tokenizer", "image", "captioner"):
        stored[name] = stored[name] and str(weights / stored[name])
    data = world.model_dump(mode="json")
    data["prepare"] |= stored
    data["clips"]["caption"] = "blip2"
    path = world.root / "run.yaml"
    path.write_text(json.dumps({"run": {"device": "cpu"}, "data": data}))
    return path


def test_everything_that_is_prepared_is_what_the_models_say(
    world: DataConfig, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EVALUATORS, "line", f"{__name__}:LineEvaluator")
    for path in sorted((world.root / "clips").rglob("*.mp4"))[3:]:  # three clips keep the job short
        path.unlink()
        path.with_suffix(".npz").unlink()
    rows = (world.root / "clips" / "metadata.csv").read_text().splitlines()
    (world.root / "clips" / "metadata.csv").write_text("\n".join(rows[:4]) + "\n")
    estimated = sorted((world.root / "clips").rglob("*.npz"))[0]
    estimated.unlink()
    file = settings_file(world, weights)
    assert main(["prepare", "--config", str(file)]) == 0
    assert "encoded 3 windows" in capsys.readouterr().out
    config = load_config(Config, str(file), ["data.use_cache=true", "data.clips.val_fraction=0"])
    dataset = RetakeDataset(config.data, seed=0, encoder=encoder_identity(config))
    batch = dataset.batch(0, range(8))
    assert {name.split("@")[0] for name in batch.source.clip_ids} == {record.clip_id for record in dataset.clips}

    codec = load_wan_codec(weights / "vae")
    text = load_text_encoder(weights / "text", weights / "tokenizer", dtype=torch.float32)
    text.length = TEXT_LENGTH
    image, captioner = load_image_encoder(weights / "image", dtype=torch.float32), load_captioner(weights / "blip2")
    policy = RetakePolicy(RetakeDiT(tiny_model()), codec)
    cond = policy.condition(batch)
    assert cond.image_tokens is not None and cond.context is not None and cond.source_latents is not None
    assert cond.context.shape == (8, TEXT_LENGTH, TEXT_DIM)
    for row, name in enumerate(batch.source.clip_ids):
        video = batch.source.video[row]
        assert torch.equal(cond.source_latents[row], codec.encode(video[None])[0])
        assert batch.prompts[row] == captioner.caption(video)
        assert torch.equal(cond.context[row], text([batch.prompts[row]])[0])
        assert torch.equal(cond.image_tokens[row], image(video[:1])[0])
        if name.startswith(estimated.stem):
            length = batch.source.camera[row].position[:, 2]
            torch.testing.assert_close(length, STEP_M * torch.arange(5.0), atol=1e-6, rtol=0)
            angles = batch.source.camera[row].increments()[0].norm(dim=-1)
            torch.testing.assert_close(angles, torch.full((4,), math.radians(2.0)), atol=1e-5, rtol=0)
    policy.precompute(cond)  # the network takes the shapes
    other = load_config(Config, str(file), ["data.use_cache=true", "data.prepare.text_length=7"])
    with pytest.raises(DataError, match="differs in the encoder"):
        RetakeDataset(other.data, seed=0, encoder=encoder_identity(other))
    narrow = RetakePolicy(RetakeDiT(tiny_model().model_copy(update={"text_dim": 12})), codec)
    with pytest.raises(DataError, match="of width 16, the model reads 8 of width 12"):
        narrow.condition(batch)


def tiny_model() -> ModelConfig:
    """A Wan-like policy that reads all prepared parts."""
    return ModelConfig(
        dim=48, heads=2, layers=1, ffn_dim=48, text_dim=TEXT_DIM, text_length=TEXT_LENGTH, freq_dim=16,
        image_dim=IMAGE_DIM, source="frames",
    )  # fmt: skip


SMOKE = ("world.clips=10", "world.trajectories=12", "data.prepare.dtype=float32", "data.prepare.windows_per_clip=9")


def overrides(folder: Path) -> list[str]:
    """The embedded world, small, in ``folder``."""
    return [*SMOKE, f"data.root={folder / 'world'}", f"data.cache={folder / 'cache'}"]


def test_verbs_prepare_the_embedded_world_on_two_ranks_and_training_reads_it_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "smoke", *overrides(tmp_path)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["prepare", *arguments]) == 0
    counts = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("encoded")]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["prepare", *arguments]) == 0
    assert len(counts) == 2 and min(counts) > 0
    assert "encoded 0 windows (0.0 B)" in (out := capsys.readouterr().out) and f"kept {sum(counts)}" in out
    assert main(["prepare", *arguments, "--dry-run"]) == 0 and "nothing to do" in capsys.readouterr().out
    dry = ["prepare", *arguments, f"data.cache={tmp_path / 'none'}", "--dry-run"]
    assert main(dry) == 0  # of nine windows a clip one is measured
    assert "predicted for at most 90 windows, from 1 measured" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # 3 kB and 120 s a window
        report = PrepareReport(encoded=4, bytes=12_000, seconds=480.0)
        patch.setattr("geoalign.data.prepare.prepare", lambda *_, **__: report)
        assert main(dry) == 0
    assert f"disk {bytes_text(270_000)}, one process 3.00 h" in capsys.readouterr().out
    assert main(["data", "check", *arguments, "data.use_cache=true"]) == 0
    assert f"{sum(counts)} windows" in (out := capsys.readouterr().out) and "0 damaged" in out
    figure = tmp_path / "paths.png"
    assert main(["data", "trajectories", *arguments, "--count", "12", "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG") and "peak turn" in capsys.readouterr().out

    config = load_config(Config, "smoke", [*overrides(tmp_path), "data.use_cache=true"])
    policy = open_policy("builtin:tiny_base")
    dataset = RetakeDataset(config.data, seed=3, encoder=encoder_identity(config))
    batch = dataset.batch(2, range(4))
    direct = RetakeDataset(config.data.model_copy(update={"use_cache": False}), seed=3)
    records = {record.clip_id: record for record in direct.clips}
    windows = [direct.loader.load(records[c], int(s)) for c, s in (n.split("@") for n in batch.source.clip_ids)]
    assert torch.equal(batch.source.video, torch.stack([to_float(window.frames) for window in windows]))
    cached, uncached = policy.condition(batch), policy.condition(replace(batch, encodings=None))
    assert cached.source_latents is not None and uncached.source_latents is not None
    assert torch.equal(cached.source_latents, uncached.source_latents)
    assert cached.context is not None and uncached.context is not None and cached.image_tokens is None
    assert torch.equal(cached.context, uncached.context)
    moved = batch.to("cpu").repeat_interleave(2).encodings
    assert moved is not None and moved.latents is not None and batch.encodings is not None
    assert torch.equal(moved.latents[::2], moved.latents[1::2]) and len(moved) == 8


def test_other_ranks_wait_for_the_world(tmp_path: Path) -> None:
    config = load_config(Config, "smoke", overrides(tmp_path))
    impatient = load_config(Config, "smoke", [*overrides(tmp_path), "train.rank_timeout_s=0.001"])
    with pytest.raises(RunError, match="rank 0 has not rendered"):
        render_missing_data(impatient, 1)
    waiting = threading.Thread(target=render_missing_data, args=(config, 1), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    render_missing_data(config, 0)
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    render_missing_data(impatient, 1)  # complete: nobody waits


class Placed(LineEvaluator):
    """Remembers where it was put."""

    def __init__(self, device: str = "auto") -> None:
        self.device = device


def test_every_rank_prepares_on_its_own_device(
    world: DataConfig, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATORS, "placed", f"{__name__}:Placed")
    monkeypatch.setitem(EVALUATORS, "line", f"{__name__}:LineEvaluator")
    unused = {"text": None, "tokenizer": None, "image": None, "captioner": None}
    file = settings_file(world, weights, evaluator="placed", **unused)
    config = load_config(Config, str(file))
    evaluator = encoders.build_encoder(config).evaluator
    assert isinstance(evaluator, Placed) and evaluator.device == "cpu"  # run.device=cpu, whatever the machine has
    chosen = load_config(Config, str(file), ["data.prepare.evaluator_options={device: meta}"])
    assert encoders.build_encoder(chosen).evaluator.device == "meta"  # type: ignore[union-attr]
    encoders.build_encoder(load_config(Config, str(file), ["data.prepare.evaluator=line"]))  # takes no device
    assert encoders.claim_device(config) == torch.device("cpu")

    events: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", events.append)
    monkeypatch.setattr(encoders, "build_encoder", lambda config: events.append("built"))
    monkeypatch.setattr("geoalign.data.prepare.prepare", lambda *_, device_id, **__: events.append(device_id) or REPORT)
    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert main(["prepare", "--config", str(file), "run.device=cuda"]) == 0
    assert events == [torch.device("cuda", 3), "built", 3]


REPORT = PrepareReport()


def test_check_looks_at_the_cameras(
    world: DataConfig, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clip without a camera, one with a damaged file, one whose path ends early: training would reject them."""
    monkeypatch.setitem(EVALUATORS, "line", f"{__name__}:LineEvaluator")
    cameras = sorted((world.root / "clips").rglob("*.npz"))
    cameras[0].unlink()
    cameras[1].write_bytes(cameras[1].read_bytes()[:300])
    lens = (0.8, 0.8 * 64 / 48, 0.5, 0.5)
    write_clip_camera(cameras[2], CameraTrajectory.identity(7, lens), (48, 64))
    arguments = ["data", "check", "--config", str(settings_file(world, weights)), "data.clips.max_bad_fraction=1"]
    causes = {}
    for evaluator in ("null", "line"):
        assert main([*arguments, f"data.prepare.evaluator={evaluator}"]) == 0
        causes[evaluator] = capsys.readouterr().out.split("windows of 5")[0]
    assert "9 clips usable, 3 rejected" in causes["null"] and "10 clips usable, 2 rejected" in causes["line"]
    assert "no metric camera file" in causes["null"] and "no metric camera file" not in causes["line"]
    assert all("npz" in text and "7 poses, frame 8 is needed" in text for text in causes.values())


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_check_opens_the_cache_that_the_run_reads_and_no_other(
    world: DataConfig, weights: Path, capsys: pytest.CaptureFixture[str], fits: bool, used: bool
) -> None:
    """Two caches of these data settings by two encoders, as a shared folder holds them: training knows its own."""
    unused = {"text": None, "tokenizer": None, "image": None, "captioner": None}
    config = load_config(Config, str(file := settings_file(world, weights, **unused)))
    for identity in (encoder_identity(config) if fits else {"codec": "another"}, {"codec": "a third"}):
        settings = {"data": data_settings(config.data), "encoder": identity}
        folder = world.cache / settings_hash(settings)
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(settings))
    code = main(["data", "check", "--config", str(file), f"data.use_cache={str(used).lower()}"])
    out, error = capsys.readouterr()
    assert "12 clips usable" in out and code == (1 if used and not fits else 0), error
    assert ("this run does not use it" in out) == (not used) and ("0 damaged files" in out) == (used and fits)
    assert ("no single cache for these settings" in error) == (used and not fits)


def test_identities_see_every_byte_of_small_files_and_the_ends_of_large_ones(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(bytes(3 << 20))
    known = {content_hash(file)}
    for position in (0, 1 << 20, (3 << 20) - 1):
        content = bytearray(3 << 20)
        content[position] = 1
        file.write_bytes(content)
        known.add(content_hash(file))
    assert len(known) == 4
    with pytest.raises(DataError, match="cannot be read"):
        content_hash(tmp_path / "none.pth")


def test_estimates_without_an_answer_are_data_errors() -> None:
    c2w = torch.eye(4).repeat(1, 2, 1, 1)
    c2w[0, 1, 0, 3] = torch.nan
    with pytest.raises(DataError, match="no camera path"):
        every_frame(PoseEstimate(c2w, torch.tensor([0, 4]), torch.ones(1), torch.zeros(1)), 5)


def test_encodings_of_another_batch_size_are_refused(world: DataConfig) -> None:
    batch = RetakeDataset(world, seed=0).batch(0, range(2))
    with pytest.raises(DataError, match="3 encodings for 2 conditions"):
        replace(batch, encodings=Encodings(latents=torch.zeros(3, 1)))
