"""VideoAlign and HPSv3 as their releases lie on the disk, with tiny random bodies.

An unmerged PEFT state dict (.pth) with its tokenizer beside it, and a flat .safetensors in the layout of transformers
before 4.52. Templates are stand-ins with their own checksums.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geoalign.rewards.vlm import needs, scorers, templates
from geoalign.rewards.vlm.layout import QwenLayout

# 256 byte tokens, the special tokens of Qwen2-VL that matter, then the scorer's own: ids follow in this order.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
START_ID, IMAGE_ID, VIDEO_ID = (
    256 + SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "image_pad", "video_pad")
)
OWN = {"videoalign": ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"), "hpsv3": ("<|Reward|>",)}
TEXTS = {
    "videoalign": "\nLook: <|VQ_reward|>\nmove: <|MQ_reward|> \nfit of {text_prompt}: <|TA_reward|>\nEND\n",
    "hpsv3_instruction": "\nJudge the picture. \n{text_prompt}\n",
    "hpsv3_suffix": "\nverdict: <|Reward|>\nEND\n",
}
KNOWN = {n: templates.Template(hashlib.sha256(t.encode()).hexdigest(), len(t), "none") for n, t in TEXTS.items()}


def layout_of(kind: str) -> QwenLayout:
    return QwenLayout(32, 2, 2, 64, 64, 2, 4, 2, 128, rows=256 + len(SPECIAL) + len(OWN[kind]))


def write_tokenizer(folder: Path, own: tuple[str, ...]) -> None:
    """A byte-level BPE without merges in the files of the Qwen2 tokenizer; ``own`` tokens are already added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *own)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(256 + i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                       "single_word": False}
        for i, token in enumerate((*SPECIAL, *own))
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "additional_special_tokens": list(SPECIAL),
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 32768,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def stock_model(kind: str):
    """A stock Qwen2-VL body with random bfloat16-representable weights of useful size."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 128, "vocab_size": layout_of(kind).rows, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, vision_start_token_id=START_ID,
        vision_end_token_id=START_ID + 1,
    )  # fmt: skip
    model = Qwen2VLModel(config).eval().requires_grad_(False)
    torch.manual_seed(len(kind))
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_((torch.randn_like(parameter) * scale + (parameter.ndim == 1)).bfloat16())
    return model


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stock names to those of the released files, in bfloat16, with the language head that the releases carry."""
    named = {name.replace("language_model.", "model.", 1): value.bfloat16() for name, value in state.items()}
    return {**named, "lm_head.weight": torch.zeros(8, 64, dtype=torch.bfloat16)}


def write_videoalign(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor], object]:
    """Write the release's files; returns the checkpoint, the head and the stock model with merged updates."""
    model = stock_model("videoalign")
    prefix, state = "base_model.model.", {}
    for name, value in published_names(model.state_dict()).items():
        stem = name.removesuffix(".weight")
        if name.startswith("model.layers.") and stem.endswith("_proj") and name.endswith("weight"):
            down, up = torch.randn(4, value.shape[1]) * 0.05, torch.randn(len(value), 4) * 0.05
            state[f"{prefix}{stem}.base_layer.weight"] = value
            state[f"{prefix}{stem}.lora_A.default.weight"], state[f"{prefix}{stem}.lora_B.default.weight"] = down, up
            target = model.get_parameter(name.replace("model.", "language_model.", 1))
            target.copy_((target + 2.0 * up @ down).bfloat16())
        elif name.startswith("model.layers.") and stem.removesuffix(".bias").endswith("_proj"):
            state[f"{prefix}{name.removesuffix('.bias')}.base_layer.bias"] = value
        else:
            state[prefix + name] = value
    head = torch.randn(1, 64).bfloat16()
    state[prefix + "rm_head.weight"] = head
    file = folder / "checkpoint-11352" / "model.pth"
    write_tokenizer(file.parent / "tokenizer", OWN["videoalign"])
    torch.save(state, file)
    return file, lambda hidden: hidden @ head.float().T, model


def write_hpsv3(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor], object]:
    from safetensors.torch import save_file

    model, head = stock_model("hpsv3"), {}
    for index, (rows, columns) in {0: (1024, 64), 3: (16, 1024), 5: (2, 16)}.items():
        head[f"rm_head.{index}.weight"] = torch.randn(rows, columns) * (2 / columns) ** 0.5
        head[f"rm_head.{index}.bias"] = torch.randn(rows) * 0.1
    folder.mkdir(parents=True)
    save_file({**published_names(model.state_dict()), **head}, folder / "HPSv3.safetensors")
    write_tokenizer(folder / "tokenizer", ())  # the base model's: the reward token is added by the loader

    def apply(hidden: Tensor) -> Tensor:
        for index in (0, 3, 5):
            hidden = hidden.relu() if index else hidden
            hidden = hidden @ head[f"rm_head.{index}.weight"].T + head[f"rm_head.{index}.bias"]
        return hidden

    return folder / "HPSv3.safetensors", apply, model


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Let the builders expect these sizes and templates."""
    for module in (scorers, needs):
        patch.setattr(module, "VIDEOALIGN_BODY", layout_of("videoalign"))
        patch.setattr(module, "HPSV3_BODY", layout_of("hpsv3"))
    patch.setattr(templates, "load", functools.partial(templates.load, known=KNOWN))


def write_templates(folder: Path) -> None:
    """The stand-ins, where ``geoalign doctor --fetch-rewards`` would put the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
