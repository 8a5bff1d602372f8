"""One preprocessing pass over the videos of a batch for all scorers that read pixels.

A scorer says at construction which frames it reads and in which form, and gets a :class:`View`. The first view that is
called on a batch runs ``geoalign_kernels.frame_preprocess`` once for all views; the others find their inputs ready.
Frames that no view reads are not touched. Which code runs is the kernel package's choice: C++ or CUDA where it can be
built, plain torch otherwise.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import geoalign_kernels as gk
from geoalign.frozen.mapanything_images import IMAGENET_MEAN, IMAGENET_STD, plan_resize
from geoalign.frozen.precision import exact_float32
from geoalign.frozen.qwen_patches import CLIP_MEAN, CLIP_STD

Form = Literal["geometry", "clip", "still"]
"""A field of ``geoalign_kernels.FrameInputs``: images for MapAnything, patches of frame pairs, patches of frames."""
FrameChoice = Callable[[int], Sequence[int]]
"""Number of frames of a video to the indices of those that are read, in their order."""
Fit = Callable[[int, int], tuple[int, int]]
"""(height, width) of a frame to those of its patches' image, multiples of 28."""

# Stands in for the patch size of a pass that makes no patches.
_NO_PATCHES = (28, 28)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a scorer sees of B videos.

    Attributes:
        inputs: float32 on the videos' device, in the layout of the view's form.
        finite: ``[B]`` bool, whether all pixels of the frames it reads are finite (what is not a number shows black).
        frames: their indices.
        size: (height, width) of the image that ``inputs`` hold, in pixels.
    """

    inputs: Tensor
    finite: Tensor
    frames: tuple[int, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """How one scorer sees videos. Call it on ``[B, F, 3, H, W]``: float32 or bfloat16 in [-1, 1], or uint8."""

    shared: SharedFrames
    form: Form
    choose: FrameChoice
    fit: Fit | None

    def __call__(self, videos: Tensor) -> Shown:
        """The inputs of this scorer, made at the first call of any view on this very tensor object."""
        return self.shared.take(self, videos)


class SharedFrames:
    """The views of one run, and the inputs of the last batch that they have not taken yet.

    Inputs are larger than the videos. So each is handed out once, and what nobody took goes when the videos go; a view
    that asks again (a scorer that is tried again) starts another pass.
    """

    def __init__(self) -> None:
        self._views: list[View] = []
        self._passes: tuple[Any, list[_Pass]] = (None, [])
        self._ready: tuple[weakref.ref[Tensor], dict[View, Shown]] | None = None

    def geometry(self, choose: FrameChoice) -> View:
        """MapAnything's normalised images, ``[B, K, 3, h, w]``."""
        return self._add("geometry", choose, None)

    def clip(self, choose: FrameChoice, fit: Fit) -> View:
        """Qwen2-VL's patches of an even number of frames, ``[B, K / 2, patches, 1176]``."""
        return self._add("clip", choose, fit)

    def still(self, choose: FrameChoice, fit: Fit) -> View:
        """Qwen2-VL's patches of single frames, ``[B, K, patches, 1176]``, every frame shown twice."""
        return self._add("still", choose, fit)

    def take(self, view: View, videos: Tensor) -> Shown:
        """What ``view`` sees of ``videos``."""
        ready, chosen = self._ready, tuple(view.choose(videos.shape[1]))
        made = None if ready is None or ready[0]() is not videos else ready[1].get(view)
        if ready is None or made is None or made.frames != chosen:
            ready = (weakref.ref(videos, self._forget), self._show(videos))
            self._ready = ready  # in one assignment: a scorer that timed out may still run on a thread of its own
        return ready[1].pop(view)

    def _add(self, form: Form, choose: FrameChoice, fit: Fit | None) -> View:
        view = View(self, form, choose, fit)
        self._views.append(view)
        self._passes = (None, [])
        return view

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._ready is not None and self._ready[0] is gone:
            self._ready = None

    @torch.no_grad()
    def _show(self, videos: Tensor) -> dict[View, Shown]:
        # The sum of a frame is finite if its pixels are (they are of size one), and takes no memory.
        finite = videos.sum(dim=(2, 3, 4), dtype=torch.float32).isfinite()
        shown = {}
        for one in self._passes_for(videos):
            # For the products of the torch path; the switches exist on CUDA alone.
            with exact_float32() if videos.is_cuda else contextlib.nullcontext():
                inputs = gk.frame_preprocess(videos, one.plan)
            for view, frames in one.frames.items():
                size = one.sizes[view.form]
                seen = finite[:, list(frames)].all(dim=1)
                shown[view] = Shown(getattr(inputs, view.form), seen, frames, size)
        return shown

    def _passes_for(self, videos: Tensor) -> list[_Pass]:
        chosen = tuple(tuple(view.choose(videos.shape[1])) for view in self._views)
        key = (chosen, *videos.shape[1:], videos.device)
        if self._passes[0] != key:
            self._passes = (key, [_make_pass(views, videos) for views in self._grouped(*videos.shape[-2:])])
        return self._passes[1]

    def _grouped(self, height: int, width: int) -> list[list[View]]:
        """Views that one pass can serve: forms differ, patch sizes agree (those of the paper's frames do)."""
        groups: list[list[View]] = []
        for view in self._views:
            for group in groups:
                sizes = {other.fit(height, width) for other in (*group, view) if other.fit}
                if len(sizes) <= 1 and view.form not in {other.form for other in group}:
                    group.append(view)
                    break
            else:
                groups.append([view])
        return groups


@dataclass(frozen=True, slots=True)
class _Pass:
    plan: gk.FramePlan
    frames: dict[View, tuple[int, ...]]
    sizes: dict[str, tuple[int, int]]


def _make_pass(views: Sequence[View], videos: Tensor) -> _Pass:
    count, (height, width) = videos.shape[1], videos.shape[-2:]
    frames = {view: tuple(view.choose(count)) for view in views}
    by_form = {view.form: chosen for view, chosen in frames.items()}
    crop = plan_resize(height, width)
    patches = next((view.fit(height, width) for view in views if view.fit), _NO_PATCHES)
    plan = gk.frame_plan(
        (height, width),
        count,
        gk.CropTarget(crop.resized, crop.output, crop.offset),
        patches,
        geometry_frames=by_form.get("geometry", ()),
        clip_frames=by_form.get("clip", ()),
        still_frames=by_form.get("still", ()),
        geometry_statistics=(IMAGENET_MEAN, IMAGENET_STD),
        patch_statistics=(CLIP_MEAN, CLIP_STD),
    )
    return _Pass(plan.to(videos.device), frames, {"geometry": crop.output, "clip": patches, "still": patches})
