"""Published checkpoint layouts: which configuration each belongs to, its exact tensors, and how to recognise a file.

Everything follows from a :class:`ModelConfig` by building the model on the meta device; no table of shapes is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from geoalign.config.model import ModelConfig
from geoalign.files.weights import Shapes, shapes_of
from geoalign.models.dit import RetakeDiT

WAN_T2V = ModelConfig()
WAN_FUN_INPAINT = ModelConfig(in_channels=36, image_dim=1280)
WAN_FUN_CONTROL_CAMERA = ModelConfig(in_channels=32, image_dim=1280, pluecker_adapter=True)
REDIRECTOR = WAN_FUN_CONTROL_CAMERA.model_copy(
    update={"source": "frames", "camera": "learned", "timestep_dtype": "bfloat16"}
)
RECAMMASTER = WAN_T2V.model_copy(
    update={"source": "frames", "camera": "modulated", "rope_layout": "sequential", "timestep_dtype": "bfloat16"}
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of checkpoint file: the model it belongs to and the part of that model which it holds."""

    name: str
    title: str
    config: ModelConfig
    holds: Callable[[str], bool] = lambda name: True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the file, original Wan names."""
        return {name: shape for name, shape in model_shapes(self.config).items() if self.holds(name)}


def is_self_attention(name: str) -> bool:
    """Whether a parameter belongs to self-attention, the part that ReDirector and Geo-Align train."""
    return "self_attn" in name


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("wan_t2v_1_3b", "Wan2.1-T2V-1.3B", WAN_T2V),
        Layout("wan_fun_inpaint_1_3b", "Wan2.1-Fun-1.3B-InP", WAN_FUN_INPAINT),
        Layout("wan_fun_control_camera_1_3b", "Wan2.1-Fun-V1.1-1.3B-Control-Camera", WAN_FUN_CONTROL_CAMERA),
        Layout("redirector", "ReDirector delta (self-attention only)", REDIRECTOR, is_self_attention),
        Layout("recammaster", "ReCamMaster full state dict", RECAMMASTER),
    )
}


@lru_cache(maxsize=16)
def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, without allocating it."""
    with torch.device("meta"):
        return shapes_of(RetakeDiT(config).state_dict())


def count(shapes: Shapes) -> dict[str, int]:
    """``{"tensors": n, "parameters": n}`` of a layout."""
    return {"tensors": len(shapes), "parameters": sum(torch.Size(shape).numel() for shape in shapes.values())}


def fingerprint(shapes: Shapes) -> str:
    """md5 over sorted names with and without shapes; equals DiffSynth-Studio's hash of a state dict's keys."""
    names = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*names, *shapes])).encode()).hexdigest()


def summary(shapes: Shapes) -> str:
    """Number of tensors and the start of their fingerprint, for people."""
    return f"{len(shapes):,} tensors, fingerprint {fingerprint(shapes)[:8]}"


def identify(shapes: Shapes) -> tuple[str, float]:
    """The published layout that a file resembles most, and the share of tensors that agree by name and shape."""
    best = ("", 0.0)
    for layout in LAYOUTS.values():
        known = layout.shapes()
        same = sum(known.get(name) == tuple(shape) for name, shape in shapes.items())
        best = max(best, (layout.name, same / max(len(known), len(shapes), 1)), key=lambda item: item[1])
    return best


# Diffusers names on the right. Order matters: the two sides swap norm2 and norm3, so each pattern is anchored.
_DIFFUSERS = (
    (r"text_embedding\.(0|2)\.", {"0": "linear_1", "2": "linear_2"}, "condition_embedder.text_embedder.{}."),
    (r"time_embedding\.(0|2)\.", {"0": "linear_1", "2": "linear_2"}, "condition_embedder.time_embedder.{}."),
    (r"time_projection\.(1)\.", {"1": "time_proj"}, "condition_embedder.{}."),
    (
        r"img_emb\.proj\.(0|1|3|4)\.",
        {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
        "condition_embedder.image_embedder.{}.",
    ),
    (r"head\.(head)\.", {"head": "proj_out"}, "{}."),
    (r"head\.(modulation)$", {"modulation": "scale_shift_table"}, "{}"),
)
_DIFFUSERS_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}


def diffusers_name(name: str) -> str:
    """Name in diffusers' ``WanTransformer3DModel`` of an original Wan name; names without counterpart are kept."""
    block = re.match(r"(blocks\.\d+\.)(.+?)(\.weight|\.bias|)$", name)
    if block:
        return block[1] + _DIFFUSERS_BLOCK.get(block[2], block[2]) + block[3]
    for pattern, names, target in _DIFFUSERS:
        found = re.match(pattern, name)
        if found:
            return target.format(names[found[1]]) + name[found.end() :]
    return name


def original_names(config: ModelConfig) -> dict[str, str]:
    """Original Wan name of every diffusers name of a model with ``config``."""
    return {diffusers_name(name): name for name in model_shapes(config)}
