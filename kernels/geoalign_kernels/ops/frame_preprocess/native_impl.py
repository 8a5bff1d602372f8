"""C++ (CPU tensors) and CUDA implementations: outputs are allocated here, the native code only fills them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import native
from geoalign_kernels.dispatch import UnsupportedInput, wanted
from geoalign_kernels.ops.frame_preprocess.op import empty_outputs
from geoalign_kernels.ops.frame_preprocess.plan import TILE

CAPABILITY = min(int(target.removeprefix("sm_")) for target in native.TARGETS)


def frame_preprocess(
    video: Tensor, axes: list[Tensor], slots: Tensor, levels: Tensor, counts: list[int], reads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.frame_preprocess``.

    Raises:
        UnsupportedInput: as ``refuse_device``; or, under ``auto``, the native code cannot be built here.
        NativeBuildError: the same where the backend was asked for by name.
    """
    try:
        native.load(video.device.type)
    except native.NativeBuildError as error:
        if wanted("frame_preprocess") != "auto":
            raise
        raise UnsupportedInput(str(error)) from error
    stream = 0
    if video.device.type == "cuda":
        refuse_device(torch.cuda.get_device_properties(video.device), reads)
        stream = torch.cuda.current_stream(video.device).cuda_stream
    outputs = empty_outputs(video, axes, counts)
    torch.ops.geoalign_native.frame_preprocess(video.contiguous(), *axes, slots, levels, *reads, stream, *outputs)
    return outputs


def refuse_device(device: Any, reads: list[int]) -> None:
    """Checks what a launch would fail on; ``device`` are torch's device properties.

    Raises:
        UnsupportedInput: no code for the device, or a tile reads more source pixels than its blocks hold.
    """
    if 10 * device.major + device.minor < CAPABILITY:
        raise UnsupportedInput(f"the CUDA code needs compute capability {CAPABILITY / 10}, {device.name} has less")
    needed = shared_bytes(reads)
    if needed > device.shared_memory_per_block_optin:
        raise UnsupportedInput(
            f"so strong a reduction takes {needed} bytes of shared memory, a block of {device.name} has "
            f"{device.shared_memory_per_block_optin}"
        )


def shared_bytes(reads: list[int]) -> int:
    """Shared memory of a block, as the launcher asks for it: float32 rows as wide as a tile, and source bytes."""
    rows, columns = reads[::2], reads[1::2]
    return 4 * TILE[1] * max(rows) + max(r * c for r, c in zip(rows, columns, strict=True))
