"""VAE, text and image encoders: original files' names against diffusers, transformers and a plain restatement."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.errors import CheckpointError, UsageError
from geoalign.models.encoders import (
    ImageEncoder,
    check_text_encoder,
    clean_text,
    convert_image_state,
    fill_text_encoder,
    original_text_name,
)
from geoalign.models.pretrained import open_pretrained
from geoalign.models.wan_decoder import make_lean
from geoalign.models.wan_vae import WanCodec, empty_wan_codec, fill_vae, original_name

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def test_vae_mapping_and_normalisation(tmp_path: Path) -> None:
    """A file in the original layout, loaded through our names, equals diffusers' own converter and network."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    reference = AutoencoderKLWan(base_dim=8)
    original = {original_name(name): value for name, value in reference.state_dict().items()}
    converted = convert_wan_vae_to_diffusers(dict(original))
    assert all(torch.equal(converted[name], value) for name, value in reference.state_dict().items())
    torch.save(original, tmp_path / "vae.pth")
    with torch.device("meta"):
        ours = AutoencoderKLWan(base_dim=8)
    fill_vae(ours, tmp_path / "vae.pth", torch.float32)
    codec, video = WanCodec(ours), torch.rand(1, 5, 3, 32, 48) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (1, *codec.latent_shape(5, 32, 48))
    with torch.no_grad():
        mean = reference.encode(video.transpose(1, 2)).latent_dist.mean
        decoded = reference.decode(mean).sample.transpose(1, 2)
    # First and last published statistics of the 16 channels (Wan2.1 vae.py).
    torch.testing.assert_close(latents[:, 0], (mean[:, 0] + 0.7571) / 2.8184, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents[:, 15], (mean[:, 15] + 0.2921) / 1.9160, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="use 5 or 9"):
        codec.latent_shape(6, 32, 48)
    with pytest.raises(UsageError, match="multiple of 16"):
        codec.latent_shape(5, 33, 48)


def decoders(dtype: torch.dtype) -> tuple[AutoencoderKLWan, AutoencoderKLWan]:
    """diffusers' and ours over the same random weights, with norms whose channels differ."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    stock = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    for norm in (module for module in stock.decoder.modules() if hasattr(module, "gamma")):
        norm.gamma.normal_(1.0, 0.3)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    return stock.to(dtype), lean.to(dtype)


def test_fewer_passes_give_the_same_video() -> None:
    """Two chunks after the first, so that kept frames are used; in bfloat16 judged by the distance from float64."""
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        stock, lean = (vae.decode(latents).sample for vae in decoders(torch.float64))
        # Values up to 1 through some forty layers: 1e-15 seen.
        torch.testing.assert_close(lean, stock, rtol=0, atol=1e-12)
        coarse = [(vae.decode(latents.bfloat16()).sample.double() - stock) for vae in decoders(torch.bfloat16)]
    theirs, ours = (float(error.abs().mean()) for error in coarse)
    assert 0 < ours < 1.5 * theirs  # most of both comes from weights and latents in bfloat16, which they share


def test_a_decoder_with_gradients_runs_as_published() -> None:
    stock, lean = decoders(torch.float64)
    gradients = []
    for vae in (stock, lean):
        latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        vae.decode(latents).sample.square().sum().backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_tiles_are_decoded_one_by_one() -> None:
    """34 x 34 latents are two tiles a side: what only the first one makes equals decoding that tile alone."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8)
    plain, latents = WanCodec(vae), torch.randn(1, 16, 1, 34, 34)
    whole, tile = plain.decode(latents), plain.decode(latents[..., :32, :32])
    tiled = WanCodec(vae, tiled=True).decode(latents)
    assert tiled.shape == whole.shape == (1, 1, 3, 272, 272)
    # diffusers' tiles are 256 pixels wide, 192 apart, and blended into the tile before them only beyond that.
    torch.testing.assert_close(tiled[..., :192, :192], tile[..., :192, :192], atol=1e-6, rtol=1e-5)
    assert not torch.equal(tiled, whole)
    small = torch.randn(1, 16, 1, 4, 6)
    assert torch.equal(WanCodec(vae, tiled=True).decode(small), plain.decode(small))


def plain_text_encoder(state: dict[str, Tensor], ids: Tensor, mask: Tensor, layers: int, heads: int) -> Tensor:
    """Wan2.1's umT5 encoder restated from its file's names (Raffel et al. 2020, bidirectional, bias in every layer)."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    offset = torch.arange(ids.shape[1])[None] - torch.arange(ids.shape[1])[:, None]  # key minus query
    distance = offset.abs()
    far = 8 + (torch.log(distance.clamp_min(1) / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(offset > 0, 16, 0) + torch.where(distance < 8, distance, far.clamp_max(15))
    x = state["token_embedding.weight"][ids]
    for layer in range(layers):
        part = {k.removeprefix(f"blocks.{layer}."): v for k, v in state.items() if k.startswith(f"blocks.{layer}.")}
        u = norm(x, part["norm1.weight"])
        q, k, v = ((u @ part[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("q", "k", "v"))
        scores = q @ k.transpose(-1, -2) + part["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(x.dtype).min)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ part["attn.o.weight"].T
        u = norm(x, part["norm2.weight"])
        gate = F.gelu(u @ part["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (u @ part["ffn.fc1.weight"].T)) @ part["ffn.fc2.weight"].T
    return norm(x, state["norm.weight"])


def test_text_encoder_mapping(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    shapes = {n: p.shape for n, p in UMT5EncoderModel(config).named_parameters()}
    original = {original_text_name(name): 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save(original, tmp_path / "text.pth")
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    fill_text_encoder(model, tmp_path / "text.pth", torch.float32, "cpu")
    ids, mask = torch.randint(1, 50, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 25:] = 0
    with torch.no_grad():
        ours = model.eval()(ids, attention_mask=mask).last_hidden_state
    expected = plain_text_encoder({k: v.double() for k, v in original.items()}, ids, mask, 2, 4)
    keep = mask.bool()
    assert (ours[keep] - expected[keep]).abs().max() < 1e-5 * expected[keep].abs().max()


def test_image_encoder_mapping_takes_the_layer_before_the_last() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
            patch_size=14, hidden_act="gelu",
        )
    )  # fmt: skip
    dim, tokens = 32, 5
    original = {
        "visual.cls_embedding": torch.randn(1, 1, dim), "visual.pos_embedding": torch.randn(1, tokens, dim),
        "visual.patch_embedding.weight": torch.randn(dim, 3, 14, 14) / 20, "visual.head": torch.randn(dim, 8),
        "log_scale": torch.ones(()), "textual.head.weight": torch.ones(2),
    }  # fmt: skip
    for end in ("pre_norm", "post_norm"):
        original |= {f"visual.{end}.weight": torch.rand(dim) + 0.5, f"visual.{end}.bias": torch.randn(dim)}
    linears = {"norm1": (dim,), "norm2": (dim,), "attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linears |= {"mlp.0": (48, dim), "mlp.2": (dim, 48)}
    for layer in range(3):
        for name, shape in linears.items():
            stem = f"visual.transformer.{layer}.{name}"
            original |= {f"{stem}.weight": torch.randn(shape) / 5, f"{stem}.bias": torch.randn(shape[0]) / 5}
    model.load_state_dict(convert_image_state(original, 3), strict=True)
    frames = torch.rand(2, 3, 40, 60) * 2 - 1
    ours = ImageEncoder(model)(frames)

    x = F.interpolate(frames, (28, 28), mode="bicubic") * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    x = (x - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    x = F.conv2d(x, original["visual.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([original["visual.cls_embedding"].expand(2, -1, -1), x], 1) + original["visual.pos_embedding"]
    x = F.layer_norm(x, (dim,), original["visual.pre_norm.weight"], original["visual.pre_norm.bias"])
    for layer in range(2):
        p = {k.split(f"transformer.{layer}.")[-1]: v for k, v in original.items() if f"transformer.{layer}." in k}
        u = F.layer_norm(x, (dim,), p["norm1.weight"], p["norm1.bias"])
        q, k, v = (
            part.unflatten(-1, (4, 8)).transpose(1, 2)
            for part in F.linear(u, p["attn.to_qkv.weight"], p["attn.to_qkv.bias"]).chunk(3, -1)
        )
        y = ((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
        u = F.layer_norm(x, (dim,), p["norm2.weight"], p["norm2.bias"])
        u = F.gelu(F.linear(u, p["mlp.0.weight"], p["mlp.0.bias"]))
        x = x + F.linear(u, p["mlp.2.weight"], p["mlp.2.bias"])
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)  # values up to 10, two layers of fp32 sums


def test_clean_text() -> None:
    assert clean_text("  a &amp;amp; b\n\tc ") == "a & b c"
    assert clean_text("\u00c3\u00a9t\u00c3\u00a9 \u201cNo.\u00a05\u201d \ufb01ne") == '\u00e9t\u00e9 "No. 5" fine'


@pytest.mark.parametrize(
    "text",
    [
        "plain words", "\u00c3\u00a9t\u00c3\u00a9 &eacute; &amp;eacute; &amp;amp;eacute;",
        "\u201cquoted\u201d \u2018it\u2019s\u2019",
        "zero\u200bwidth\u2028line\u2029 \u3000wide", "\uff26\uff35\uff2c\uff2c width \ufb01gure", "nul \x00 bell \x07",
        "&lt;b&gt;bold&lt;/b&gt;", "\u8857\u9053 \u3002\u591c\u665a", "a\r\nb\tc  d", "\ud83d\ude00 \U0001f600", "",
    ],
)  # fmt: skip
def test_text_is_cleaned_as_the_published_tokenizer_does_it(text: str) -> None:
    """diffusers restates Wan2.1's own wrapper of the tokenizer."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_text(text) == prompt_clean(text)


@pytest.mark.parametrize("kind", [["umt5"], {"a": 1}, 3, None, "bert"])
def test_a_folder_of_another_kind_is_named(kind: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=r"config.json says "):
        check_text_encoder(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"num_layers": 10**9}, {"vision_config": {"num_hidden_layers": 10**9}}, {"num_res_blocks": 10**9},
     {"depths": [2, 10**9]}, {"n_layers": 1001}],
)  # fmt: skip
def test_a_folder_that_asks_for_a_billion_layers_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "umt5", "block_size": 4096} | settings))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (key, *_) = (name for name in re.findall(r"[a-z_]+", json.dumps(settings)) if name != "vision_config")
    for use in (check_text_encoder, empty_wan_codec, lambda path: open_pretrained(None, path, "text encoder")):
        with pytest.raises(CheckpointError, match=rf"config\.json: {key} is \d+, at most 1000"):
            use(tmp_path)
