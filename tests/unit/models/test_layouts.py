"""Published layouts from configuration alone: counts, fingerprints, names in diffusers, manifests in the tree."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from repository import GOLDEN

from geoalign.cli.main import main
from geoalign.config.model import ModelConfig
from geoalign.models.layouts import (
    LAYOUTS,
    count,
    diffusers_name,
    fingerprint,
    identify,
    is_self_attention,
    model_shapes,
    original_names,
)
from geoalign.models.wan_vae import original_name
from geoalign.policy.formats import manifest
from geoalign.policy.lora import PREFIX, is_factored

FOLDER = GOLDEN / "models"


def published_manifest(config: ModelConfig, kind: str, rank: int = 16) -> dict[str, Any]:
    """Manifest of an export of a full-size model in bfloat16, from its configuration alone (nothing is allocated)."""
    shapes = model_shapes(config)
    if kind == "redirector":
        shapes = {name: shape for name, shape in shapes.items() if is_self_attention(name)}
    elif kind == "diffusers":
        shapes = {diffusers_name(name): shape for name, shape in shapes.items()}
    elif kind == "lora":
        pairs = {n.removesuffix(".weight"): s for n, s in shapes.items() if is_factored(n)}
        down = {f"{PREFIX}{name}.lora_A.weight": (rank, shape[1]) for name, shape in pairs.items()}
        shapes = down | {f"{PREFIX}{name}.lora_B.weight": (shape[0], rank) for name, shape in pairs.items()}
    return manifest({n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()})


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [  # totals published with, or derived from, the checkpoints themselves
        ("wan_t2v_1_3b", 825, 1_418_996_800),
        ("wan_fun_control_camera_1_3b", 989, 1_616_313_152),
        ("redirector", 360, 329_840_640),
        ("recammaster", 945, 1_490_420_800),
    ],
)
def test_exact_size_of_published_layouts(name: str, tensors: int, parameters: int) -> None:
    assert count(LAYOUTS[name].shapes()) == {"tensors": tensors, "parameters": parameters}


@pytest.mark.parametrize(
    ("name", "digest"),
    [  # the hashes by which DiffSynth-Studio (commit fed7b18, Apache-2.0) recognises the published files
        ("wan_t2v_1_3b", "9269f8db9040a9d860eaca435be61814"),
        ("wan_fun_control_camera_1_3b", "ac6a5aa74f4a0aab6f64eb9a72f19901"),
        ("wan_fun_inpaint_1_3b", "6d6ccde6845b95ad9114ab993d917893"),
    ],
)
def test_fingerprint_is_that_of_the_published_file(name: str, digest: str) -> None:
    assert fingerprint(LAYOUTS[name].shapes()) == digest


def test_vae_names_have_the_fingerprint_of_the_published_file() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan()
    shapes = {original_name(name): tuple(value.shape) for name, value in vae.state_dict().items()}
    assert count(shapes) == {"tensors": 194, "parameters": 126_892_531}
    assert fingerprint(shapes) == "ccc42284ea13e1ad04693284c7a09be6"


def test_text_encoder_names_have_the_fingerprint_of_the_published_file() -> None:
    from transformers import UMT5EncoderModel

    from geoalign.models.encoders import original_text_name, umt5_xxl_config

    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_xxl_config())
    shapes = {original_text_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    assert count(shapes) == {"tensors": 242, "parameters": 5_680_910_336}
    assert fingerprint(shapes) == "9c8818c2cbea55eca56c7b447df170da"


def test_every_layout_recognises_itself() -> None:
    for name, layout in LAYOUTS.items():
        assert identify(layout.shapes()) == (name, 1.0)
    assert identify({"encoder.conv1.weight": (3, 3)})[1] == 0.0


def test_names_map_one_to_one_onto_diffusers() -> None:
    from diffusers import WanTransformer3DModel

    for key, channels, image in (("wan_t2v_1_3b", 16, None), ("wan_fun_inpaint_1_3b", 36, 1280)):
        with torch.device("meta"):
            theirs = WanTransformer3DModel(
                num_attention_heads=12, ffn_dim=8960, num_layers=30, in_channels=channels, image_dim=image,
                added_kv_proj_dim=1536 if image else None,
            )  # fmt: skip
        names, shapes = original_names(LAYOUTS[key].config), LAYOUTS[key].shapes()
        expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
        assert {name: shapes[ours] for name, ours in names.items()} == expected


def test_manifest_verb_prints_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "manifest", "--json", "-"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["redirector"]["tensors"] == 360
    assert table["recammaster"]["parameters"] == 1_490_420_800
    assert main(["model", "manifest", "--layout", "nonsense"]) == 2


@pytest.mark.parametrize(
    ("file", "layout", "kind"),
    [
        ("redirector", "redirector", "redirector"),
        ("recammaster", "recammaster", "recammaster"),
        ("diffusers", "wan_t2v_1_3b", "diffusers"),
        ("lora", "redirector", "lora"),
    ],
)
def test_export_manifests_in_the_tree(file: str, layout: str, kind: str) -> None:
    """Committed manifests are what an export of the full-size model holds; a changed name or shape breaks readers."""
    committed = json.loads((FOLDER / f"{file}.manifest.json").read_text("utf-8"))
    assert published_manifest(LAYOUTS[layout].config, kind) == committed
