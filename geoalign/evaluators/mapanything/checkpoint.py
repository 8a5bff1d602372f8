"""Strict loading of published MapAnything weights into the pose-only network."""

from __future__ import annotations

from pathlib import Path

import torch

from geoalign.errors import CheckpointError, RewardError, UsageError
from geoalign.evaluators.mapanything.layout import HUB_IDS, LAYOUTS, PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.files.weights import Shapes, TensorFile, shapes_of

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


def find_weights(path: str | Path, layout_name: str) -> Path:
    """The safetensors file at ``path`` (the file, or a folder that holds ``model.safetensors``).

    Raises RewardError with the download command when it is missing, CheckpointError when it is not safetensors.
    """
    if layout_name not in LAYOUTS:
        raise UsageError(f"unknown MapAnything layout {layout_name!r}; known: {', '.join(LAYOUTS)}")
    found = Path(path).expanduser()
    found = found / WEIGHTS_NAME if found.is_dir() else found
    if not found.is_file():
        hub_id = HUB_IDS[layout_name, "apache-2.0"]
        folder = found.parent if found.suffix else found
        raise RewardError(
            f"MapAnything weights not found at {found}. On a machine with a network run: "
            f"pip install huggingface_hub && hf download {hub_id} {WEIGHTS_NAME} --local-dir {folder}"
        )
    if found.suffix != ".safetensors":
        raise CheckpointError(f"{found}: only .safetensors is read (pickled files can run code); use {WEIGHTS_NAME}")
    return found


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
    with torch.device("meta"):
        network = PoseNetwork(layout).use_matrix_dtype(matrix_dtype)
    wanted = network.state_dict()
    source = TensorFile(weights).renamed(lambda name: None if name.split(".", 1)[0] in SKIPPED_MODULES else name)
    source.require(shapes_of(wanted), "does not fit", _layout_hint)
    # Cast on the host: half the bytes cross the bus, and the device never holds both precisions.
    loaded = {name: tensor.to(wanted[name].dtype).to(device) for name, tensor in source.items()}
    network.load_state_dict(loaded, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _layout_hint(found: Shapes) -> str:
    """Which released layout the tensors look like, judged by the encoder's width."""
    token = found.get("scale_token")
    for name, layout in LAYOUTS.items():
        if token == (layout.encoder_width,):
            return f"Its encoder width is that of layout {name!r}; set the layout to that, or download the file again."
    return f"It is no released MapAnything checkpoint; get one of: {', '.join(sorted(set(HUB_IDS.values())))}."
