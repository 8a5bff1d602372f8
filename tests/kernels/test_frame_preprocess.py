"""Frame pre-processor: the C++ twin against the reference and both against the reward models' own preparation and
the stock image processor of Qwen2-VL; the CUDA tile on the host; validation; registration."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import geoalign_kernels as gk
from geoalign.rewards.mapanything.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessor, plan_resize
from geoalign.rewards.vlm.layout import VIDEOALIGN_BODY
from geoalign.rewards.vlm.preprocess import CLIP_MEAN, CLIP_STD, PatchMaker, to_uint8
from geoalign_kernels import native
from geoalign_kernels.ops.frame_preprocess.plan import TILE

FRAMES = 5
CLIP, STILL, GEOMETRY = (0, 3, 1, 4), (4, 1), (0, 1, 2, 4)
LEVEL = max(1 / 255 / std for std in (*IMAGENET_STD, *CLIP_STD))
"""One 8-bit level after the normalisation that stretches most."""
SIZES = [(480, 832), (97, 131), (336, 588)]


def plan_of(size: tuple[int, int], **changes: Any) -> gk.FramePlan:
    crop = plan_resize(*size)
    fields: dict[str, Any] = {
        "size": size,
        "frames": FRAMES,
        "geometry": gk.CropTarget(crop.resized, crop.output, crop.offset),
        "patches": maker(size).fitted,
        "geometry_frames": GEOMETRY,
        "clip_frames": CLIP,
        "still_frames": STILL,
        "geometry_statistics": (IMAGENET_MEAN, IMAGENET_STD),
        "patch_statistics": (CLIP_MEAN, CLIP_STD),
    }
    return gk.frame_plan(**(fields | changes))


def maker(size: tuple[int, int]) -> PatchMaker:
    return PatchMaker(size, VIDEOALIGN_BODY, min_pixels=100_352, max_pixels=200_704)


def clip_of(size: tuple[int, int], dtype: torch.dtype = torch.uint8, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, FRAMES, 3, *size)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return (torch.rand(shape, generator=generator) * 2.2 - 1.1).to(dtype)


def assert_within_a_level(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        # Half a level of slack for the float32 difference of two normalised values: an error of 2 levels still fails.
        assert (a - b).abs().max() < 1.5 * LEVEL
        # Only sums that float32 puts on two sides of a rounding tie may differ at all.
        assert ((a - b).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_both_implementations_equal_the_reward_models_own_preparation(size, dtype) -> None:
    video, plan = clip_of(size, dtype), plan_of(size)
    levels = video if dtype == torch.uint8 else to_uint8(video)
    patches = maker(size)
    truth = (
        Preprocessor(plan_resize(*size))(levels[:, list(GEOMETRY)]),
        patches(levels[:, list(CLIP)]),
        torch.stack([patches(levels[:, i : i + 1])[:, 0] for i in STILL], dim=1),
    )
    with gk.use_backend("cpp", "frame_preprocess"):
        native_inputs = gk.frame_preprocess(video, plan)
    assert_within_a_level(native_inputs, truth)
    with gk.use_backend("reference", "frame_preprocess"):
        reference_inputs = gk.frame_preprocess(video, plan)
    assert_within_a_level(reference_inputs, truth)
    assert_within_a_level(native_inputs, reference_inputs)


def test_patch_order_and_values_are_those_of_the_stock_processor() -> None:
    """Frames of the final size need no resize, so the stock processor's patches must come out bit for bit but for the
    float32 rounding of its own normalisation."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = (336, 588)
    video = clip_of(size)
    stock = Qwen2VLImageProcessorPil(min_pixels=100_352, max_pixels=200_704)
    inputs = gk.frame_preprocess(video, plan_of(size))
    for slot, frame in enumerate(STILL):
        wanted = stock(Image.fromarray(video[0, frame].permute(1, 2, 0).numpy()), return_tensors="pt")
        assert wanted["image_grid_thw"].tolist() == [[1, 24, 42]]
        # Distinct levels lie 1/255/std > 0.014 apart, so 1e-5 leaves no room for a pixel in another place.
        torch.testing.assert_close(inputs.still[0, slot], wanted["pixel_values"].float(), atol=1e-5, rtol=0)


def test_geometry_equals_pillow() -> None:
    size = (480, 832)
    video, crop = clip_of(size), plan_resize(*size)
    got = gk.frame_preprocess(video, plan_of(size)).geometry[0, 1]
    image = Image.fromarray(video[0, 1].permute(1, 2, 0).numpy())
    resized = np.asarray(image.resize(crop.resized[::-1], Image.Resampling.LANCZOS))
    (top, left), (height, width) = crop.offset, crop.output
    levels = torch.from_numpy(resized[top : top + height, left : left + width].copy()).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert_within_a_level((got,), ((levels / 255 - mean) / std,))


def test_not_a_number_becomes_level_zero_and_the_batch_is_independent() -> None:
    size = (97, 131)
    plan, video = plan_of(size), clip_of(size, torch.float32, batch=2)
    black = video.clone()
    black[1] = -1.0
    video[1] = float("nan")
    for backend in ("cpp", "reference"):
        with gk.use_backend(backend, "frame_preprocess"):
            got, wanted, alone = (gk.frame_preprocess(v, plan) for v in (video, black, video[:1]))
        for a, b, c in zip(got, wanted, alone, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[:1], c)


def test_layout_of_the_video_in_memory_does_not_matter() -> None:
    size = (97, 131)
    plan, video = plan_of(size), clip_of(size)
    channels_last = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for a, b in zip(gk.frame_preprocess(video, plan), gk.frame_preprocess(channels_last, plan), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_frames": (0, 1, 2)}, "pairs"),
        ({"clip_frames": (0, 0)}, "distinct"),
        ({"still_frames": (5,)}, "below 5"),
        ({"patches": (336, 590)}, "multiples of 28"),
        ({"patches": (0, 28)}, "positive"),
        ({"geometry": gk.CropTarget((20, 20), (10, 10), (0, 11))}, "crop"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of((97, 131), **({"patches": (280, 364)} | changes))


def test_a_video_that_does_not_fit_the_plan_is_refused() -> None:
    plan, video = plan_of((97, 131)), clip_of((97, 131))
    with pytest.raises(ValueError, match=r"\[B, 5, 3, 97, 131\]"):
        gk.frame_preprocess(video[:, 1:], plan)
    with pytest.raises(ValueError, match="float64"):
        gk.frame_preprocess(video.double(), plan)
    with pytest.raises(ValueError, match="plan is not on"):
        gk.frame_preprocess(video, plan.to("meta"))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_registration(backend: str) -> None:
    plan = plan_of((97, 131))
    arguments = (
        clip_of((97, 131)), list(plan.axes), plan.slots, plan.levels, list(plan.counts), list(plan.reads),
    )  # fmt: skip
    with gk.use_backend(backend, "frame_preprocess"):
        torch.library.opcheck(torch.ops.geoalign.frame_preprocess.default, arguments)


def test_tables_never_read_outside_the_image_and_tiles_are_those_of_the_kernel() -> None:
    header = (native.source_folder() / "include/geoalign/frame_tile.cuh").read_text()
    found = re.search(r"kTileHeight = (\d+), kTileWidth = (\d+)", header)
    assert found is not None
    assert tuple(map(int, found.groups())) == TILE
    for size in (*SIZES, (1, 1), (3, 200), (1080, 1920)):
        plan = plan_of(size, patches=(28, 560))
        for axis, length in enumerate((size[1], size[0]) * 2):
            first, weights = plan.axes[2 * axis], plan.axes[2 * axis + 1]
            assert first.min() >= 0
            assert first.max() + weights.shape[1] <= length
            assert (first.diff() >= 0).all()
            # Rows are normalised in float64 and rounded once: each of the taps is off by at most half an ulp of 1.
            torch.testing.assert_close(
                weights.double().sum(1), torch.ones(len(first), dtype=torch.float64), atol=1e-5, rtol=0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_cuda_equals_the_reference(dtype: torch.dtype) -> None:
    for size in SIZES:
        video, plan = clip_of(size, dtype, batch=2), plan_of(size)
        with gk.use_backend("reference", "frame_preprocess"):
            wanted = gk.frame_preprocess(video, plan)
        with gk.use_backend("cuda", "frame_preprocess"):
            got = gk.frame_preprocess(video.cuda(), plan.to("cuda"))
        assert_within_a_level(tuple(t.cpu() for t in got), wanted)
