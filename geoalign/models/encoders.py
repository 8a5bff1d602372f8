"""Text (umT5-xxl) and image (CLIP ViT-H/14) encoders of Wan2.1: transformers' networks, the original files' names."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.errors import CheckpointError
from geoalign.files.parsing import first_line
from geoalign.files.weights import TensorFile, shapes_of
from geoalign.models.checkpoint import place
from geoalign.models.layouts import summary
from geoalign.models.pretrained import check_pretrained, open_pretrained

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

_TEXT_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_IMAGE_LAYER = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"} | {
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_IMAGE_ENDS = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.position_embedding.weight": "pos_embedding",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
}
# CLIP's preprocessing constants (openai/CLIP).
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def original_text_name(name: str) -> str:
    """Name in ``models_t5_umt5-xxl-enc-bf16.pth`` of a parameter of transformers' ``UMT5EncoderModel``."""
    name = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}.get(name, name)
    name = name.replace("encoder.block.", "blocks.")
    for theirs, ours in _TEXT_BLOCK.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def fill_text_encoder(model: UMT5EncoderModel, path: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Place an original umT5 file into transformers' encoder, strictly."""
    place(model, [_opened_text(model, path)], dtype, device)
    model.encoder.embed_tokens = model.shared


def _opened_text(model: UMT5EncoderModel, path: Path) -> TensorFile:
    """The file's tensors under the names of ``model``, which they fit."""
    shapes = shapes_of(dict(model.named_parameters()))  # tied parameters appear once
    names = {original_text_name(name): name for name in shapes}
    source = TensorFile(path).renamed(lambda name: names.get(name, name))
    return source.require(shapes, "is not the umT5 encoder of Wan2.1")


def _umt5_on_meta() -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        return UMT5EncoderModel(umt5_xxl_config())


def check_text_encoder(path: Path) -> str:
    """Look at the weights that :func:`load_text_encoder` would load, by headers; a few words, and the same errors."""
    if path.is_dir():
        return check_pretrained(path, "umT5 text encoder folder", ("umt5",))
    return summary(_opened_text(_umt5_on_meta(), path).shapes)


def check_image_encoder(path: Path) -> str:
    """Look at what :func:`load_image_encoder` would load, by headers; a few words, and the same errors."""
    if path.is_dir():
        return check_pretrained(path, "CLIP vision folder", ("clip", "clip_vision_model"))
    shapes = TensorFile(path).shapes
    blocks = {name.split(".")[2] for name in shapes if name.startswith("visual.transformer.")}
    if shapes.get("visual.patch_embedding.weight") != (1280, 3, 14, 14) or len(blocks) != 32:
        raise CheckpointError(f"{path}: not the open-clip ViT-H/14 file of Wan2.1 ({len(blocks)} vision blocks)")
    return summary(shapes)


class TextEncoder:
    """Prompts to ``[B, length, dim]`` with zeros beyond each prompt's own tokens."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, length: int = 512) -> None:
        self.model, self.tokenizer, self.length = model.eval().requires_grad_(False), tokenizer, length

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts, padded or cut to ``length`` tokens; every prompt is masked by its own length."""
        tokens = self.tokenizer(
            [clean_text(p) for p in prompts], padding="max_length", truncation=True, max_length=self.length,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return hidden * tokens.attention_mask[..., None].to(hidden.dtype)


def clean_text(text: str) -> str:
    """As the published tokenizer of Wan2.1 does: repair mis-decoded Unicode, unescape HTML twice, collapse white space.

    Whoever changes what comes back raises ``geoalign.data.captions.CLEANING_VERSION``.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def umt5_xxl_config() -> UMT5Config:
    """Settings of google/umt5-xxl's encoder."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )


def load_text_encoder(
    weights: Path, tokenizer: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Load the original ``.pth`` or a transformers folder, with a tokenizer folder.

    Raises:
        CheckpointError: missing or damaged files, or another model's weights.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    try:
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # of json, the tokenizers library and transformers itself
        raise CheckpointError(f"{tokenizer}: tokenizer cannot be read ({first_line(error)})") from error
    if weights.is_dir():
        network: Any = open_pretrained(UMT5EncoderModel, weights, "umT5 text encoder folder", dtype=dtype)
        return TextEncoder(network.to(device), words)
    model = _umt5_on_meta()
    fill_text_encoder(model, weights, dtype, device)
    return TextEncoder(model, words)


def convert_image_state(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Original ``visual.`` tensors to transformers' names: q, k, v are cut apart, singleton axes dropped.

    Text tower, temperature and the projection head are left out: Wan2.1 does not use them.
    """
    visual = {name: value for name, value in state.items() if name.startswith("visual.") and name != "visual.head"}
    result: dict[str, Tensor] = {}
    for theirs, ours in _IMAGE_ENDS.items():
        for suffix in ("",) if theirs.startswith("embeddings") else (".weight", ".bias"):
            value = visual.pop(f"visual.{ours}{suffix}")
            flat = (
                value.flatten() if ours == "cls_embedding" else value.squeeze(0) if ours == "pos_embedding" else value
            )
            result[theirs + suffix] = flat
    for layer in range(layers):
        prefix = f"visual.transformer.{layer}."
        for kind in ("weight", "bias"):
            joined = visual.pop(f"{prefix}attn.to_qkv.{kind}").chunk(3)
            for part, value in zip("qkv", joined, strict=True):
                result[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = value
            for theirs, ours in _IMAGE_LAYER.items():
                result[f"encoder.layers.{layer}.{theirs}.{kind}"] = visual.pop(f"{prefix}{ours}.{kind}")
    if visual:
        raise KeyError(next(iter(visual)))
    return result


class ImageEncoder:
    """First frames to CLIP tokens ``[B, 257, 1280]``: output after all but the last block, no final norm."""

    def __init__(self, model: CLIPVisionModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [-1, 1]: bicubic to the model's size without crop or antialiasing, then encode."""
        size = self.model.config.image_size
        x = F.interpolate(frames.float(), size=(size, size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
        x = ((x * 0.5 + 0.5) - mean) / std
        return self.model(x.to(self.model.dtype), output_hidden_states=True).hidden_states[-2]


def load_image_encoder(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> ImageEncoder:
    """Load the open-clip ``.pth`` (its vision tower) or a transformers folder.

    Raises:
        CheckpointError: missing or damaged files, or another model's weights.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if path.is_dir():
        vision: Any = open_pretrained(CLIPVisionModel, path, "CLIP vision folder", dtype=dtype)
        return ImageEncoder(vision.to(device))
    settings: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    config = CLIPVisionConfig(**settings, num_attention_heads=16, image_size=224, patch_size=14, hidden_act="gelu")
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    try:
        state = convert_image_state(dict(TensorFile(path).items()), 32)
        model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, strict=False, assign=True)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not the open-clip ViT-H/14 file of Wan2.1 ({error})") from error
    ids = torch.arange(model.embeddings.num_positions, device=device).expand(1, -1)
    model.embeddings.register_buffer("position_ids", ids, persistent=False)
    return ImageEncoder(model)
