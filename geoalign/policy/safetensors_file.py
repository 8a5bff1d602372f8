"""Writing a safetensors file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from geoalign.errors import UsageError
from geoalign.files.atomic import atomic_path
from geoalign.files.sealed import save_sealed


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write ``tensors`` (contiguous, on the CPU) to ``path``; raises UsageError for another suffix."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: this format is written as .safetensors")
    with atomic_path(path) as temporary:
        save_sealed(tensors, temporary, {"format": "pt"})
