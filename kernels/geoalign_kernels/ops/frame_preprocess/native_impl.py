"""C++ (CPU tensors) and CUDA implementations: outputs are allocated here, the native code only fills them."""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign_kernels import native
from geoalign_kernels.dispatch import UnsupportedInput, wanted
from geoalign_kernels.ops.frame_preprocess.op import empty_outputs


def frame_preprocess(
    video: Tensor, axes: list[Tensor], slots: Tensor, levels: Tensor, counts: list[int], reads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.frame_preprocess`.

    Raises:
        UnsupportedInput: under `auto`, the native code cannot be built here.
        NativeBuildError: the same where the backend was asked for by name.
    """
    try:
        native.load(video.device.type)
    except native.NativeBuildError as error:
        if wanted("frame_preprocess") != "auto":
            raise
        raise UnsupportedInput(str(error)) from error
    outputs = empty_outputs(video, axes, counts)
    torch.ops.geoalign_native.frame_preprocess(video.contiguous(), *axes, slots, levels, *reads, *outputs)
    return outputs
