"""Strict loading of published MapAnything weights into the pose-only network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from geoalign.config.published import MAPANYTHING, MAPANYTHING_V1
from geoalign.errors import CheckpointError, RewardError, UsageError
from geoalign.evaluators.mapanything.layout import HUB_IDS, LAYOUTS, PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.files.need import Need
from geoalign.files.weights import Shapes, TensorFile, shapes_of
from geoalign.models.layouts import summary

SKIPPED_MODULES = (
    # Encoders of geometric inputs (rays, depth, poses): the reward feeds images only, and they then add exactly zero.
    "ray_dirs_encoder",
    "depth_encoder",
    "depth_scale_encoder",
    "cam_rot_encoder",
    "cam_trans_encoder",
    "cam_trans_scale_encoder",
    # The dense head (DPT) and its second name in the published files: it reads the trunk and feeds nothing back.
    "dpt_feature_head",
    "dpt_regressor_head",
    "dense_head",
)
"""Top-level modules of the published network that the pose path does not read. Any other unknown tensor is an error."""

WEIGHTS_NAME = "model.safetensors"
PUBLISHED = {"v1.1": MAPANYTHING, "v1": MAPANYTHING_V1}


def find_weights(path: str | Path, layout_name: str) -> Path:
    """The safetensors file at ``path`` (the file, or a folder that holds ``model.safetensors``).

    Raises RewardError with the download command when it is missing, CheckpointError when it is not safetensors.
    """
    if layout_name not in LAYOUTS:
        raise UsageError(f"unknown MapAnything layout {layout_name!r}; known: {', '.join(LAYOUTS)}")
    found = Path(path).expanduser()
    found = found / WEIGHTS_NAME if found.is_dir() else found
    if not found.is_file():
        raise RewardError(
            f"MapAnything weights not found at {found}. On a machine with a network run: "
            f"{_download(found, layout_name)}"
        )
    if found.suffix != ".safetensors":
        raise CheckpointError(f"{found}: only .safetensors is read (pickled files can run code); use {WEIGHTS_NAME}")
    return found


def _download(path: Path, layout_name: str) -> str:
    return PUBLISHED[layout_name].line_into(path)


def needs(checkpoint: str, *, layout: str = "v1.1", backend: str = "native", **_: Any) -> tuple[Need, ...]:
    """What the evaluator with these options reads; the published backend resolves its name by itself."""
    path = Path(checkpoint).expanduser()

    def verify(path: Path) -> str:
        return summary(_opened(find_weights(path, layout), LAYOUTS[layout]).shapes)

    return (Need("MapAnything weights", path, _download(path, layout), verify),) if backend == "native" else ()


def load_pose_network(
    path: str | Path,
    layout_name: str,
    *,
    device: torch.device | str = "cpu",
    matrix_dtype: torch.dtype = torch.float32,
) -> PoseNetwork:
    """Read published weights; the result is in eval mode, frozen, on ``device``, and needs ``set_size(height, width)``.

    Nothing is downloaded and no random weight is ever drawn: the network is built on the meta device.

    Args:
        path: ``model.safetensors`` or its folder.
        layout_name: "v1.1" or "v1".
        matrix_dtype: storage dtype of the matrices of encoder and trunk.
    """
    weights = find_weights(path, layout_name)
    return load_layout(weights, LAYOUTS[layout_name], device=device, matrix_dtype=matrix_dtype)


def load_layout(
    weights: Path, layout: PoseNetworkLayout, *, device: torch.device | str, matrix_dtype: torch.dtype
) -> PoseNetwork:
    """Read a safetensors file in the published key layout into a network of any size (see ``load_pose_network``)."""
    network = _on_meta(layout).use_matrix_dtype(matrix_dtype)
    wanted, source = network.state_dict(), _opened(weights, layout)
    # Cast on the host: half the bytes cross the bus, and the device never holds both precisions.
    loaded = {name: tensor.to(wanted[name].dtype).to(device) for name, tensor in source.items()}
    network.load_state_dict(loaded, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _on_meta(layout: PoseNetworkLayout) -> PoseNetwork:
    with torch.device("meta"):
        return PoseNetwork(layout)


def _opened(weights: Path, layout: PoseNetworkLayout) -> TensorFile:
    """The tensors of the pose path, whose names and shapes are those of the layout."""
    source = TensorFile(weights).renamed(lambda name: None if name.split(".", 1)[0] in SKIPPED_MODULES else name)
    return source.require(shapes_of(_on_meta(layout).state_dict()), "does not fit", _layout_hint)


def _layout_hint(found: Shapes) -> str:
    """Which released layout the tensors look like, judged by the encoder's width."""
    token = found.get("scale_token")
    for name, layout in LAYOUTS.items():
        if token == (layout.encoder_width,):
            return f"Its encoder width is that of layout {name!r}; set the layout to that, or download the file again."
    return f"It is no released MapAnything checkpoint; get one of: {', '.join(sorted(set(HUB_IDS.values())))}."
