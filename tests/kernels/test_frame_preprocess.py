"""Frame pre-processor: the C++ twin and the reference against Pillow, torch's resize and the stock image processor of
Qwen2-VL; layouts, batches, not-a-number; validation; registration; the tables."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import geoalign_kernels as gk
from geoalign.frozen.mapanything_images import IMAGENET_MEAN, IMAGENET_STD, plan_resize
from geoalign.frozen.qwen_patches import CLIP_MEAN, CLIP_STD, fit_size
from geoalign_kernels import native
from geoalign_kernels.dispatch import UnsupportedInput
from geoalign_kernels.ops.frame_preprocess import native_impl
from geoalign_kernels.ops.frame_preprocess.plan import TILE, pillow_taps, torch_taps

FRAMES = 5
CLIP, STILL, GEOMETRY = (0, 3, 1, 4), (4, 1), (0, 1, 2, 4)
AREA = {"min_pixels": 100_352, "max_pixels": 200_704}
LEVEL = max(1 / 255 / std for std in (*IMAGENET_STD, *CLIP_STD))
"""One 8-bit level after the normalisation that stretches most."""
# Shrinks both sides, enlarges both sides, and leaves the patches as they are.
SIZES = [(480, 832), (97, 131), (336, 588)]


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    return fit_size(*size, factor=28, **AREA)


def plan_of(size: tuple[int, int], **changes: Any) -> gk.FramePlan:
    crop = plan_resize(*size)
    fields: dict[str, Any] = {
        "size": size,
        "frames": FRAMES,
        "geometry": gk.CropTarget(crop.resized, crop.output, crop.offset),
        "patches": fitted(size),
        "geometry_frames": GEOMETRY,
        "clip_frames": CLIP,
        "still_frames": STILL,
        "geometry_statistics": (IMAGENET_MEAN, IMAGENET_STD),
        "patch_statistics": (CLIP_MEAN, CLIP_STD),
    }
    return gk.frame_plan(**(fields | changes))


def clip_of(size: tuple[int, int], dtype: torch.dtype = torch.uint8, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, FRAMES, 3, *size)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return (torch.rand(shape, generator=generator) * 2.2 - 1.1).to(dtype)


def levels_of(video: Tensor) -> Tensor:
    """uint8; values in [-1, 1] are those that a video file would store."""
    return video if video.dtype == torch.uint8 else ((video.float() + 1) * 127.5).round().clamp(0, 255).byte()


def image_of(frame: Tensor) -> Image.Image:
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def pillow_geometry(levels: Tensor) -> Tensor:
    """[frames, 3, h, w] by Pillow."""
    crop = plan_resize(*levels.shape[-2:])
    kind = Image.Resampling.LANCZOS if crop.resized[1] < levels.shape[-1] else Image.Resampling.BICUBIC
    (top, left), (height, width) = crop.offset, crop.output
    images = [np.asarray(image_of(frame).resize(crop.resized[::-1], kind)) for frame in levels]
    cut = torch.from_numpy(np.stack(images)[:, top : top + height, left : left + width]).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (cut / 255 - mean) / std


def torch_resized(levels: Tensor) -> Tensor:
    """As VideoAlign's clips are: torch's antialiased resize, rounded once."""
    size = fitted(tuple(levels.shape[-2:]))
    return F.interpolate(levels.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()


def stock_stills(levels: Tensor) -> Tensor:
    """[frames, patches, 1176] by the stock processor, which resizes with Pillow what has another size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = fitted(tuple(levels.shape[-2:]))
    stock = Qwen2VLImageProcessorPil(**AREA)
    patches = []
    for frame in levels:
        wanted = stock(image_of(frame), return_tensors="pt")
        assert wanted["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
        patches.append(wanted["pixel_values"].float())
    return torch.stack(patches)


def paired(stills: Tensor) -> Tensor:
    """Patches of a video from those of its frames: one half of each from either frame of a pair."""
    halves = stills.unflatten(2, (3, 2, 196))[:, :, :, 0]
    return torch.stack((halves[0::2], halves[1::2]), dim=3).flatten(2)


def assert_levels(got: Tensor, wanted: Tensor, share: float) -> None:
    """No value is off by more than a level, and at most `share` of them are off at all."""
    assert got.shape == wanted.shape
    # Half a level of slack for the float32 difference of two normalised values: an error of 2 levels still fails.
    assert (got - wanted).abs().max() < 1.5 * LEVEL
    # Distinct levels lie 1/255/std > 0.014 apart.
    assert ((got - wanted).abs() > 1e-5).float().mean() <= share


# Only sums near a rounding tie may differ. Two float32 sums of up to 14 products of size 255 differ by about 3e-5, and
# so one value in 30,000 may; with Pillow's own 22-bit weights as many do in each of its two passes.
TIES, PILLOW_TIES = 3e-5, 6e-5


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_inputs_equal_those_of_pillow_torch_and_the_stock_processor(size, dtype, backend) -> None:
    video = clip_of(size, dtype)
    with gk.use_backend(backend, "frame_preprocess"):
        got = gk.frame_preprocess(video, plan_of(size))
    levels = levels_of(video)[0]
    assert_levels(got.geometry[0], pillow_geometry(levels[list(GEOMETRY)]), PILLOW_TIES)
    assert_levels(got.clip[0], paired(stock_stills(torch_resized(levels[list(CLIP)]))), TIES)
    assert_levels(got.still[0], stock_stills(levels[list(STILL)]), PILLOW_TIES)


@pytest.mark.parametrize("size", [(240, 416), (416, 240), (48, 64), (532, 532)])
def test_geometry_equals_pillow_at_other_shapes(size: tuple[int, int]) -> None:
    video = clip_of(size)
    got = gk.frame_preprocess(video, plan_of(size, clip_frames=(), still_frames=())).geometry[0]
    assert_levels(got, pillow_geometry(video[0, list(GEOMETRY)]), PILLOW_TIES)


def photo_like(size: tuple[int, int]) -> Tensor:
    """[3, h, w]: smooth light, a checked floor, hard edges and the grain of a sensor."""
    y, x = torch.meshgrid(torch.arange(float(size[0])), torch.arange(float(size[1])), indexing="ij")
    light = 90 + 60 * torch.sin(x / 97) * torch.cos(y / 71) + 20 * torch.sin(x / 3.1 + y / 4.3)
    light = torch.where(((x // 13 + y // 17) % 2 == 0) & (y > 0.6 * size[0]), light + 60, light)
    light = torch.where((x - 0.3 * size[1]).square() + (y - 0.4 * size[0]).square() < 900, 250.0, light)
    grain = 4 * torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    return (light * torch.tensor([1.0, 0.9, 0.7])[:, None, None] + grain).round().clamp(0, 255).byte()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("size", [(480, 832), (480, 854), (97, 131), (1080, 1920)])
def test_stills_have_the_levels_of_pillows_own_resize(size: tuple[int, int], backend: str) -> None:
    """Its two passes: a single rounding, as for clips, moves one value in six of such a picture."""
    frame, (height, width) = photo_like(size), fitted(size)
    statistics = ((0.0,) * 3, (1 / 255,) * 3)  # leaves the levels as they are
    plan = plan_of(size, geometry_frames=(), clip_frames=(1, 2), still_frames=(0,), patch_statistics=statistics)
    with gk.use_backend(backend, "frame_preprocess"):
        got = gk.frame_preprocess(frame.expand(1, FRAMES, -1, -1, -1), plan)
    pillow = torch.from_numpy(np.array(image_of(frame).resize((width, height), Image.Resampling.BICUBIC)))
    rows = pillow.view(height // 28, 2, 14, width // 28, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
    gap = (got.still[0, 0].view(-1, 3, 2, 196) - rows.reshape(-1, 3, 1, 196)).abs().round()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() <= PILLOW_TIES
    once = (got.clip[0, 0].view(-1, 3, 2, 196) - rows.reshape(-1, 3, 1, 196)).abs().round()
    assert (once > 0).float().mean() > 0.1


def test_white_and_black_have_the_normalised_values_of_the_statistics() -> None:
    size = (97, 131)
    for level, value in ((255, 1.0), (0, 0.0)):
        got = gk.frame_preprocess(torch.full((1, FRAMES, 3, *size), level, dtype=torch.uint8), plan_of(size))
        for image, (mean, std) in (
            (got.geometry.movedim(2, -1), (IMAGENET_MEAN, IMAGENET_STD)),
            (got.clip.unflatten(-1, (3, -1)).movedim(-2, -1), (CLIP_MEAN, CLIP_STD)),
        ):
            wanted = ((value - torch.tensor(mean)) / torch.tensor(std)).expand_as(image)
            torch.testing.assert_close(image, wanted)


def test_frames_of_the_final_size_keep_every_pixel_in_its_place() -> None:
    size = (336, 588)
    video = clip_of(size)
    got = gk.frame_preprocess(video, plan_of(size))
    stills = stock_stills(video[0])  # nothing to resize
    torch.testing.assert_close(got.still[0], stills[list(STILL)], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.clip[0], paired(stills[list(CLIP)]), atol=1e-5, rtol=0)


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


def test_an_output_without_frames_is_empty_and_leaves_the_others_alone() -> None:
    size = (97, 131)
    video = clip_of(size)
    for backend in ("cpp", "reference"):
        with gk.use_backend(backend, "frame_preprocess"):
            whole = gk.frame_preprocess(video, plan_of(size))
            got = gk.frame_preprocess(video, plan_of(size, geometry_frames=(), clip_frames=(), still_frames=(1,)))
        assert (got.geometry.numel(), got.clip.numel()) == (0, 0)
        assert torch.equal(got.still[:, 0], whole.still[:, STILL.index(1)])


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
    video = clip_of((97, 131), batch=2).transpose(1, 2).contiguous().transpose(1, 2)  # channels before frames
    arguments = (
        video, list(plan.axes), plan.slots, plan.levels, list(plan.counts), list(plan.reads),
    )  # fmt: skip
    with gk.use_backend(backend, "frame_preprocess"):
        torch.library.opcheck(torch.ops.geoalign.frame_preprocess.default, arguments)


def test_tables_never_read_outside_the_image_and_tiles_are_those_of_the_kernel() -> None:
    header = (native.source_folder() / "include/geoalign/frame_tile.cuh").read_text()
    found = re.search(r"kTileHeight = (\d+), kTileWidth = (\d+)", header)
    assert found is not None
    assert tuple(map(int, found.groups())) == TILE
    # 21 to 28 and 420 to 560: every third output falls on an input.
    for size in (*SIZES, (1, 1), (3, 200), (21, 420), (1080, 1920)):
        plan = plan_of(size, patches=(28, 560))
        for axis, length in enumerate((size[1], size[0]) * 3):
            first, weights = plan.axes[2 * axis], plan.axes[2 * axis + 1]
            assert first.min() >= 0
            assert first.max() + weights.shape[1] <= length
            assert (first.diff() >= 0).all()
            # Rows are normalised in float64 and rounded once: each of the taps is off by at most half an ulp of 1.
            torch.testing.assert_close(
                weights.double().sum(1), torch.ones(len(first), dtype=torch.float64), atol=1e-5, rtol=0
            )


def test_a_device_that_a_launch_would_fail_on_is_refused_for_the_reference() -> None:
    a100 = SimpleNamespace(name="A100", major=8, minor=0, shared_memory_per_block_optin=163 << 10)
    small = SimpleNamespace(name="RTX 4090", major=8, minor=9, shared_memory_per_block_optin=99 << 10)
    old = SimpleNamespace(name="T4", major=7, minor=5, shared_memory_per_block_optin=64 << 10)
    video, photo = (list(plan_of(size, patches=(336, 588)).reads) for size in ((480, 832), (2160, 3840)))
    for device in (a100, small):
        native_impl.refuse_device(device, video)
    native_impl.refuse_device(a100, photo)
    with pytest.raises(UnsupportedInput, match=r"capability 8\.0, T4"):
        native_impl.refuse_device(old, video)
    with pytest.raises(UnsupportedInput, match="RTX 4090 has 101376"):
        native_impl.refuse_device(small, photo)
    # By hand: 10 source rows of 84 float32 each, and the largest of three areas in bytes.
    assert native_impl.shared_bytes([10, 100, 8, 200, 9, 50]) == 10 * 84 * 4 + 1600
    assert native_impl.shared_bytes([10, 100, 8, 200, 12, 150]) == 12 * 84 * 4 + 1800


def test_no_resize_is_the_identity() -> None:
    sharpest, cubic = (pillow_taps(300, 300, 0, 300, filters) for filters in ("sharpest", "cubic"))
    for first, weights in (sharpest, cubic, torch_taps(300, 300)):
        matrix = torch.zeros(300, 300).scatter_add(1, first.long()[:, None] + torch.arange(weights.shape[1]), weights)
        torch.testing.assert_close(matrix, torch.eye(300), rtol=0, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_cuda_equals_the_cpu_bit_for_bit(dtype: torch.dtype) -> None:
    """The same tables, order of sums and rounding, without fused multiply-add. A machine without nvcc says so."""
    reason = native.obstacle("cuda")
    if reason:
        with (
            gk.use_backend("cuda", "frame_preprocess"),
            pytest.raises(gk.BackendUnavailableError, match=re.escape(reason)),
        ):
            gk.frame_preprocess(clip_of(SIZES[0], dtype).cuda(), plan_of(SIZES[0]).to("cuda"))
        return
    for size in SIZES:
        video, plan = clip_of(size, dtype, batch=2), plan_of(size)
        with gk.use_backend("cpp", "frame_preprocess"):
            wanted = gk.frame_preprocess(video, plan)
        with gk.use_backend("cuda", "frame_preprocess"):
            got = gk.frame_preprocess(video.cuda(), plan.to("cuda"))
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.cpu(), b)
