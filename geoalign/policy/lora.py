"""LoRA export: the difference of two models' self-attention as low-rank factors. Lossy, and says by how much."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoalign.errors import CheckpointError, UsageError
from geoalign.files.weights import require, shapes_of
from geoalign.models.dit import RetakeDiT
from geoalign.policy.safetensors_file import save_safetensors

PREFIX = "diffusion_model."
_FACTORED = re.compile(r"blocks\.\d+\.self_attn\.[qkvo]\.weight$")


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What the factors keep.

    Attributes:
        tensors: what was written, by name.
        residual: norm of the part of the matrices' difference that the rank cannot hold, over the norm of the whole.
        omitted: norm of the difference of biases, norms and phase maps (not expressible as LoRA), over the whole.
        omitted_names: how many such tensors differ.
    """

    tensors: dict[str, Tensor]
    residual: float
    omitted: float
    omitted_names: int


def is_factored(name: str) -> bool:
    """Whether a parameter is one of the matrices that the LoRA format covers."""
    return _FACTORED.match(name) is not None


def export_lora(
    base: RetakeDiT, tuned: RetakeDiT, path: Path, rank: int, dtype: torch.dtype = torch.bfloat16
) -> LoraReport:
    """Write ``diffusion_model.blocks.N.self_attn.{q,k,v,o}.lora_{A,B}.weight`` of ``tuned - base`` by truncated SVD.

    B A is the best approximation of each difference at this rank (Eckart-Young); singular values are split evenly.

    Raises:
        UsageError: a rank that is not positive, or exceeds the width.
        CheckpointError: the two models have different parameters, or no matrix of them differs.
    """
    if not 0 < rank <= base.config.dim:
        raise UsageError(f"--rank {rank} must be between 1 and the model width {base.config.dim}")
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    tensors: dict[str, Tensor] = {}
    lost = omitted = changed = 0.0
    names = 0
    require(
        "the trained model", shapes_of(after), shapes_of(before), "has other tensors than the model before training"
    )
    for name, value in after.items():
        difference = value.detach().float() - before[name].detach().float()
        energy = float(difference.square().sum(dtype=torch.float64))
        if not is_factored(name):
            omitted, names = omitted + energy, names + (energy > 0)
            continue
        changed += energy
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        root = s[:rank].sqrt()
        stem = PREFIX + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = (root[:, None] * vh[:rank]).to(dtype).contiguous()
        tensors[f"{stem}.lora_B.weight"] = (u[:, :rank] * root).to(dtype).contiguous()
        lost += float(s[rank:].square().sum(dtype=torch.float64))
    if not changed:
        raise CheckpointError(
            "no matrix of the self-attention differs before and after training, so all factors would be zero: give the "
            "untrained model with --model and what was trained on top with --checkpoint, such as a run's "
            "delta.safetensors or the average.safetensors of a checkpoint"
        )
    save_safetensors(tensors, path)
    return LoraReport(tensors, (lost / changed) ** 0.5, (omitted / (changed + omitted)) ** 0.5, names)
