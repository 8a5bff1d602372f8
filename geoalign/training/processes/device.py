"""Where a run computes and in which type."""

from __future__ import annotations

import os

import torch

from geoalign.config.training import RunConfig
from geoalign.errors import UsageError

_TORCHRUN = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


def device_of(config: RunConfig) -> torch.device:
    """The device of this process: its own GPU (``LOCAL_RANK``) or the CPU.

    Raises:
        UsageError: CUDA is asked for and not there, or this machine has fewer GPUs than processes of the run.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    local, processes = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "auto" and found == 0:
        return torch.device("cpu")
    if found < processes:  # checked alike by all of them: a run must not mix GPUs and CPUs
        raise UsageError(
            f"run.device={config.device}: this machine has {found} CUDA devices for {processes} processes; start one "
            "process per GPU at most, or use run.device=cpu (`geoalign doctor` shows what this machine has)"
        )
    return torch.device("cuda", local)


def repeat_exactly() -> None:
    """Make torch use repeatable kernels or raise; before the first product on CUDA, whose workspaces it fixes.

    Cross-attention is torch's own operator: of its kernels, flash repeats in this mode, the memory-efficient one and
    cuDNN's do not.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Type of the network's matrices."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
