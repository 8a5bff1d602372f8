"""BLIP-2 captions: a tiny random model in the published folder format against a hand-written greedy search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_captioner import QUERIES, SIZE, VOCABULARY, save_tiny_blip2, toy_tokenizer
from torch import Tensor

from geoalign.cli.main import main
from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.config.model import ModelConfig
from geoalign.data.video import read_video, write_video
from geoalign.errors import CheckpointError, DataError
from geoalign.models.captions import load_captioner
from geoalign.models.dit import RetakeDiT
from geoalign.policy.formats import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip2(tmp_path_factory.mktemp("blip2"))


@torch.no_grad()
def greedy(folder: Path, frame: Tensor) -> list[str]:
    """Words by repeated full forwards of transformers' model; the frame has the model's size, so nothing is resized."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    # CLIP's statistics (openai/CLIP), as in BLIP-2's preprocessor; pixels go through 8 bits.
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = ((frame + 1) * 127.5).round() / 255
    pixels = (levels - mean[:, None, None]) / std[:, None, None]
    tokens = [4] * QUERIES + [0]
    for _ in range(40):
        ids = torch.tensor([tokens])
        logits = model(pixels[None], ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 2:
            break
    return [VOCABULARY[token] for token in tokens if token > 4]


def test_caption_is_the_greedy_text_of_the_middle_frame(folder: Path) -> None:
    torch.manual_seed(3)
    frames = torch.rand(5, 3, SIZE, SIZE) * 2 - 1
    captioner = load_captioner(folder)
    expected = greedy(folder, frames[2])
    assert len(set(expected)) > 1  # a text that says something
    assert captioner.caption(frames).split() == expected
    others = frames.clone()
    others[[0, 1, 3, 4]] = 0
    assert captioner.caption(others).split() == expected
    assert captioner.caption(frames[[4]]).split() != expected


def test_refusals_name_the_folder_and_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf download Salesforce/blip2-opt-2\.7b --include .* --local-dir"):
        load_captioner(tmp_path / "none")
    for name, text in (("other", '{"model_type": "opt"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, "utf-8")
        with pytest.raises(CheckpointError, match=name):
            load_captioner(tmp_path / name)
    (tmp_path / "cut").mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        (tmp_path / "cut" / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match="cut"):
        load_captioner(tmp_path / "cut")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (tmp_path / "cut" / "config.json").write_text(json.dumps(settings | {"image_token_index": None}), "utf-8")
    with pytest.raises(CheckpointError, match="image_token_index"):
        load_captioner(tmp_path / "cut")


def test_empty_caption_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = load_captioner(folder)
    monkeypatch.setattr(captioner.model, "generate", lambda *_, **__: torch.tensor([[4, 0, 2]]))
    with pytest.raises(DataError, match="empty caption"):
        captioner.caption(torch.zeros(3, 3, SIZE, SIZE))


def save_tiny_model(folder: Path) -> Path:
    """A transformer that reads text, with a text encoder and an autoencoder; all random."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    config = ModelConfig(
        dim=48, heads=2, layers=1, ffn_dim=64, text_dim=16, freq_dim=32, source="frames", camera="modulated",
        rope_layout="sequential",
    )  # fmt: skip
    text = UMT5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    torch.manual_seed(4)
    save_pretrained(RetakeDiT(config), folder)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    toy_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def test_sample_takes_the_caption_for_the_missing_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record holds the caption; giving the same words as --prompt makes the same video, other words another."""
    model, clip = save_tiny_model(tmp_path / "model"), tmp_path / "in.mp4"
    torch.manual_seed(5)
    write_video(clip, (torch.rand(5, 4, 6, 3) * 255).to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2), 8)

    def run(name: str, *more: str) -> int:
        paths = ("--model", str(model), "--video", str(clip), "--out", str(tmp_path / name))
        return main(["sample", *paths, "--trajectory", "pan_right", "--steps", "2", "--size", "32x48", *more])

    assert run("none.mp4") == 2
    assert "--captioner FOLDER" in capsys.readouterr().err
    assert run("none.mp4", "--captioner", str(tmp_path)) == 1
    assert not (tmp_path / "none.mp4").exists()
    assert run("made.mp4", "--captioner", str(folder)) == 0
    record = json.loads((tmp_path / "made.json").read_text("utf-8"))
    prompt = record["used"]["prompt"]
    assert set(prompt.split()) <= set(VOCABULARY[5:]) and record["used"]["guidance"] == 5.0
    assert record["used"]["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT
    assert run("none.mp4", "--prompt", "a", "--guidance", "1", "--negative-prompt", "b") == 2
    assert run("same.mp4", "--prompt", prompt) == 0
    assert run("other.mp4", "--prompt", "two dogs") == 0
    made, same, other = (read_video(tmp_path / f"{name}.mp4", range(5)).float() for name in ("made", "same", "other"))
    # Equal pixels do not always give equal files: about one lossy encoding in a hundred differs by a few bytes.
    assert (same - made).abs().mean() < 0.1 * (other - made).abs().mean()
    (model / "text_encoder").rename(tmp_path / "text_encoder")
    capsys.readouterr()
    for more in ((), ("--dry-run",), ("--guidance", "1"), ("--prompt", "two dogs")):
        assert run("none.mp4", *more) == 2
        said = capsys.readouterr().err
        assert f"reads text, and {model} holds no text encoder; put text_encoder/ with tokenizer/" in said
    assert not (tmp_path / "none.mp4").exists()
