"""Where a run computes and in which type."""

from __future__ import annotations

import os

import torch

from geoalign.config.training import RunConfig
from geoalign.errors import UsageError


def device_of(config: RunConfig) -> torch.device:
    """The device of this process: its own GPU (``LOCAL_RANK``) or the CPU.

    Raises:
        UsageError: CUDA is asked for and not there.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        return torch.device("cuda", local)
    if config.device == "cuda":
        raise UsageError(
            f"run.device=cuda: process {local} of this machine finds {torch.cuda.device_count()} CUDA devices; start "
            "one process per GPU at most, or use run.device=cpu (`geoalign doctor` shows what this machine has)"
        )
    return torch.device("cpu")


def dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Type of the network's matrices."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
