"""Strict loading of the published scorers: every tensor is used or listed as dropped, and none is random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from geoalign.errors import CheckpointError, RewardError
from geoalign.files.weights import Shapes, TensorFile, require, shapes_of
from geoalign.rewards.vlm.body import RewardQwen
from geoalign.rewards.vlm.layout import QwenLayout

Head = Callable[[QwenLayout], nn.Module]
PEFT_PREFIX = "base_model.model."
# The language head is never run: the reward head reads hidden states.
DROPPED = ("lm_head.weight",)
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def read_tensors(path: str | Path, download: str) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` or ``.pth`` file (no code is run), memory-mapped.

    Raises RewardError naming the ``download`` command when the file is missing, CheckpointError when it is unreadable.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RewardError(f"reward weights not found at {file}. On a machine with a network run: {download}")
    return dict(TensorFile(file).items())


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove ``prefix`` from every key; a key without it is an error."""
    strangers = [name for name in state if not name.startswith(prefix)]
    if strangers:
        raise CheckpointError(f"{len(strangers)} keys lack the prefix {prefix!r}: {', '.join(strangers[:3])}")
    return {name[len(prefix) :]: tensor for name, tensor in state.items()}


def fold_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Fold unmerged low-rank updates: W + scale * B @ A in float32, rounded once to the dtype of W.

    Args:
        state: PEFT keys ``X.base_layer.weight``, ``X.lora_A.default.weight``, ``X.lora_B.default.weight``.
        scale: alpha / rank.

    Raises CheckpointError for an incomplete triple.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((_DOWN, _UP)):
            stem = name.removesuffix(_DOWN).removesuffix(_UP)
            lost = [stem + part for part in (_BASE + "weight", _DOWN, _UP) if stem + part not in state]
            if lost:
                raise CheckpointError(f"incomplete low-rank update of {stem}: {', '.join(lost)} missing")
        elif name.endswith(_BASE + "weight"):
            stem = name.removesuffix(_BASE + "weight")
            if stem + _DOWN not in state or stem + _UP not in state:
                raise CheckpointError(f"incomplete low-rank update of {stem}: {_DOWN} or {_UP} missing")
            update = state[stem + _UP].float() @ state[stem + _DOWN].float()
            out[f"{stem}.weight"] = (tensor.float() + scale * update).to(tensor.dtype)
        else:
            out[name.replace(_BASE, ".")] = tensor
    return out


def check_headers(file: TensorFile, prefix: str, layout: QwenLayout, head: Head) -> None:
    """Compare the names and shapes of a published file with a scorer of ``layout``, without reading a tensor.

    Args:
        prefix: of every name; with one the file holds unmerged low-rank updates, whose own tensors are not compared.
        head: makes the reward head.

    Raises CheckpointError for a missing, unknown or wrongly shaped tensor.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in file.shapes.items():
        if not name.startswith(prefix):
            raise CheckpointError(f"{file.path}: its key {name} lacks the prefix {prefix!r}")
        if not name.endswith((_DOWN, _UP)):
            found[name[len(prefix) :].replace(_BASE, ".")] = shape
    _require(file.path, found, _on_meta(layout, head))


def _on_meta(layout: QwenLayout, head: Head) -> RewardQwen:
    with torch.device("meta"):
        return RewardQwen(layout, head(layout))


def _require(source: str | Path, found: Shapes, network: RewardQwen) -> None:
    expected = shapes_of(network.state_dict()) | {name: found.get(name, ()) for name in DROPPED}  # there, in any shape
    require(source, found, expected, "does not fit", lambda _: "Download the published file again.")


def load_scorer(
    layout: QwenLayout,
    head: Head,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    device: torch.device | str = "cpu",
    matrix_dtype: torch.dtype = torch.bfloat16,
) -> RewardQwen:
    """Put ``state`` (published key names) into a frozen :class:`RewardQwen` of ``layout``.

    Args:
        head: makes the reward head.
        source: named in errors.

    Raises CheckpointError for a missing, unknown or wrongly shaped tensor.
    """
    network = _on_meta(layout, head).use_matrix_dtype(matrix_dtype)
    _require(source, shapes_of(state), network)
    wanted = network.state_dict()
    loaded = {name: state[name].to(tensor.dtype).to(device) for name, tensor in wanted.items()}
    network.load_state_dict(loaded, strict=True, assign=True)
    return network.eval().requires_grad_(False)
