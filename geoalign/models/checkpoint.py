"""Reading published weights: strict both ways, one tensor at a time, straight into a model on the meta device.

Peak host memory is the model itself plus the tensor in flight; :class:`LoadReport` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from geoalign.config.model import ModelConfig
from geoalign.files.weights import Shapes, TensorFile
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import (
    LAYOUTS,
    REDIRECTOR,
    Layout,
    count,
    identify,
    is_self_attention,
    model_shapes,
    original_names,
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did.

    Attributes:
        tensors: tensors placed in the model.
        file_bytes: bytes of tensor data read.
        peak_bytes: largest sum of bytes of placed tensors and the tensors being read and cast.
    """

    tensors: int
    file_bytes: int
    peak_bytes: int


def resemblance(found: Shapes) -> str:
    """Which published model the tensors look like, as the last sentence of an error."""
    name, share = identify(found)
    if share < 0.05:
        return "The file resembles no known layout."
    return f"The file resembles {LAYOUTS[name].title} ({share:.0%} of its tensors)."


def place(
    model: nn.Module, sources: Sequence[TensorFile], dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> LoadReport:
    """Move the tensors of checked files into ``model`` one by one, replacing meta or existing parameters.

    ``dtype`` None keeps the type of every tensor as stored.
    """
    peak, read, parameters = 0, 0, dict(model.named_parameters())
    size = sum(parameter.nbytes for parameter in parameters.values() if not parameter.is_meta)
    for source in sources:
        for name, tensor in source.items():
            old = parameters[name]
            freed = 0 if old.is_meta else old.nbytes
            value = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
            size += value.nbytes
            peak = max(peak, size + tensor.nbytes)
            size, read = size - freed, read + tensor.nbytes
            owner, _, leaf = name.rpartition(".")
            parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(model.get_submodule(owner), leaf, parameters[name])
    return LoadReport(len(parameters), read, peak)


def load_dit(
    config: ModelConfig,
    sources: Sequence[TensorFile],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[RetakeDiT, LoadReport]:
    """Build a model on the meta device and fill it from checked files, in their order (:func:`complete_weights`, ...).

    ``dtype`` None keeps the type of every tensor as stored.
    """
    with torch.device("meta"):
        model = RetakeDiT(config)
    return model, place(model, sources, dtype, device)


def complete_weights(config: ModelConfig, file: TensorFile) -> TensorFile:
    """Files with all tensors of a model (original Wan or diffusers names), by their original names.

    Raises:
        CheckpointError: anything missing, unexpected, misshapen or quantised.
    """
    verdict = f"is not a complete checkpoint for {title_of(config)}"
    return _originally_named(config, file).require(model_shapes(config), verdict, resemblance)


def redirector_weights(
    base: TensorFile, delta: TensorFile, config: ModelConfig = REDIRECTOR
) -> tuple[TensorFile, TensorFile]:
    """ReDirector: its base (Wan2.1-Fun-Control-Camera), by original names, and the self-attention of the delta.

    Plain Wan2.1-T2V has self-attention of the same names and shapes, so
    a wrong base would load almost silently elsewhere; here the base must have all its own tensors.

    Raises:
        CheckpointError: a wrong base or an incomplete delta.
    """
    base_config = config.model_copy(update={"camera": "none", "source": "none"})
    verdict = f"is not the base of ReDirector ({title_of(base_config)})"
    base = _originally_named(base_config, base).require(model_shapes(base_config), verdict, resemblance)
    trained = {name: shape for name, shape in model_shapes(config).items() if is_self_attention(name)}
    return base, delta.require(trained, "is not a ReDirector delta", resemblance)


def layout_of(shapes: Shapes) -> Layout | None:
    """The published layout whose tensors are exactly these, or None."""
    return next((layout for layout in LAYOUTS.values() if dict(shapes) == layout.shapes()), None)


def _originally_named(config: ModelConfig, file: TensorFile) -> TensorFile:
    """The file, with diffusers' names replaced by the original ones if it uses them."""
    if not any(name.startswith("condition_embedder.") for name in file.shapes):
        return file
    names = original_names(config)
    return file.renamed(lambda name: names.get(name, name))


def title_of(config: ModelConfig) -> str:
    """The published model that a configuration describes, or its size."""
    for layout in LAYOUTS.values():
        if model_shapes(layout.config) == model_shapes(config):
            return layout.title
    numbers = count(model_shapes(config))
    return f"a model of {numbers['tensors']} tensors, {numbers['parameters']:,} parameters"
