"""``frame_preprocess``: public function, validation, registration. Not differentiable; bitwise deterministic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.ops.frame_preprocess.plan import PAIR, PATCH, PATCH_VALUES, FramePlan
from geoalign_kernels.registration import define

_HERE = "geoalign_kernels.ops.frame_preprocess"
dispatch.register(
    "frame_preprocess",
    reference=f"{_HERE}.reference:frame_preprocess",
    cpp=f"{_HERE}.native_impl:frame_preprocess",
    cuda=f"{_HERE}.native_impl:frame_preprocess",
)
_PIXELS = (torch.uint8, torch.float32, torch.bfloat16)


class FrameInputs(NamedTuple):
    """Inputs of the reward models, float32."""

    geometry: Tensor
    """[B, geometry frames, 3, h, w]: resized with 8-bit rounding after each pass, cropped, normalised."""
    clip: Tensor
    """[B, clip frames / 2, patches, 1176]: flat patches of frame pairs in Qwen2-VL's order, resized as by torch."""
    still: Tensor
    """[B, still frames, patches, 1176]: each frame alone, shown twice, resized as by Pillow."""


def frame_preprocess(video: Tensor, plan: FramePlan) -> FrameInputs:
    """All inputs of the reward models from one pass over the decoded clips.

    Args:
        video: [B, T, 3, H, W], uint8 levels, or float32 / bfloat16 in [-1, 1] (rounded to 8-bit levels first; NaN
            becomes level 0).
        plan: of ``frame_plan`` for these frames, on the device of ``video``.

    Raises:
        ValueError: shape, dtype or device of the video does not fit the plan.
        BackendUnavailableError, NativeBuildError: a backend asked for by name cannot run or be built here.
    """
    expected = (plan.slots.shape[1], 3, *plan.size)
    if video.dim() != 5 or tuple(video.shape[1:]) != expected:
        raise ValueError(f"video must be [B, {', '.join(map(str, expected))}] for this plan, got {list(video.shape)}")
    if video.dtype not in _PIXELS:
        raise ValueError(f"video must be uint8, float32 or bfloat16, got {video.dtype}")
    if any(table.device != video.device for table in (*plan.axes, plan.slots, plan.levels)):
        raise ValueError(f"the plan is not on {video.device}; use plan.to(video.device)")
    outputs = torch.ops.geoalign.frame_preprocess(
        video, list(plan.axes), plan.slots, plan.levels, list(plan.counts), list(plan.reads)
    )
    return FrameInputs(*outputs)


def empty_outputs(video: Tensor, axes: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (geometry, clip, still) in the shapes of ``FrameInputs``."""
    width, height, patch_width, patch_height = (axes[i].shape[0] for i in (0, 2, 4, 6))
    patches = patch_height * patch_width // PATCH**2
    return (
        video.new_empty((video.shape[0], counts[0], 3, height, width), dtype=torch.float32),
        video.new_empty((video.shape[0], counts[1] // PAIR, patches, PATCH_VALUES), dtype=torch.float32),
        video.new_empty((video.shape[0], counts[2], patches, PATCH_VALUES), dtype=torch.float32),
    )


def _fake(
    video: Tensor, axes: list[Tensor], slots: Tensor, levels: Tensor, counts: list[int], reads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(video, axes, counts)


define(
    "frame_preprocess",
    "(Tensor video, Tensor[] axes, Tensor slots, Tensor levels, int[] counts, int[] reads) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
