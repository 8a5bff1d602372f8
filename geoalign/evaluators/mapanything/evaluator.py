"""MapAnything as a :class:`~geoalign.rewards.base.PoseEvaluator`: frames of any size in, metric camera poses out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEstimate
from geoalign.evaluators.mapanything.checkpoint import load_pose_network
from geoalign.evaluators.mapanything.network import PoseBackend, PoseNetwork
from geoalign.evaluators.mapanything.poses import relative_to_first
from geoalign.frozen.arena import ScorerMemory
from geoalign.frozen.device import named_device
from geoalign.frozen.frames import SharedFrames
from geoalign.frozen.graphed import Body, GraphedScorer
from geoalign.frozen.mapanything_images import IMAGENET_MEAN, IMAGENET_STD
from geoalign.frozen.precision import exactly
from geoalign.types import SourceClip

_LUMA = (0.299, 0.587, 0.114)
# A frame shows something when the means of its patches vary by more than one 8-bit level (codec noise stays below).
_MIN_CONTRAST = 1.0
# Neighbouring frames show one place when their patch means correlate. Independent noise on 777 patches correlates by
# 0.036 (one sigma); camera motion leaves natural frames far above this bound.
_MIN_CORRELATION = 0.2
_CELL = 14

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def frame_subset(frames: int, stride: int) -> tuple[int, ...]:
    """Every ``stride``-th frame from 0 on, and always the last one."""
    if stride < 1 or frames < 2:
        raise UsageError(f"a pose needs at least 2 frames and a stride of at least 1, got {frames} and {stride}")
    chosen = list(range(0, frames, stride))
    return tuple(chosen if chosen[-1] == frames - 1 else [*chosen, frames - 1])


def coherent_share(levels: Tensor) -> Tensor:
    """Share ``[B]`` of neighbouring frame pairs that show one lit place.

    Black or flat frames have no contrast and noise does not correlate over time, so both give about 0; a network that
    must always answer would hide that. A still picture gives 1: its camera is readable, it just does not move.

    Args:
        levels: ``[B, V, 3, h, w]`` levels 0..255.
    """
    red, green, blue = levels.unbind(dim=2)
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    cells = F.avg_pool2d(luma, _CELL, ceil_mode=True).flatten(2)
    centred = cells - cells.mean(dim=-1, keepdim=True)
    spread = centred.square().mean(dim=-1).sqrt()
    both = spread[:, 1:] * spread[:, :-1]
    correlation = (centred[:, 1:] * centred[:, :-1]).mean(dim=-1) / both.clamp_min(1e-6)
    lit = (spread[:, 1:] > _MIN_CONTRAST) & (spread[:, :-1] > _MIN_CONTRAST)
    return (lit & (correlation > _MIN_CORRELATION)).float().mean(dim=1)


class PoseBody(nn.Module):
    """The captured part: images of one size to re-based poses. Static shapes, no host reads."""

    def __init__(self, network: PoseBackend) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images ``[B, V, 3, h, w]`` to ``c2w`` ``[B, V, 4, 4]`` and, ``[B]`` each, ``tracked``,
        ``metric_scale`` and ``reference_offset_m``."""
        poses = self.network(images)
        # Normalising and back is good to 1e-4 of a level: rounding gives the exact one.
        levels = ((images * self.std + self.mean) * 255).round()
        return {
            "c2w": relative_to_first(poses.quaternion, poses.translation),
            "tracked": coherent_share(levels),
            "metric_scale": poses.scale[:, 0],
            "reference_offset_m": poses.translation[:, 0].norm(dim=-1),
        }


class MapAnythingEvaluator:
    """Metric camera poses by a frozen MapAnything, from images alone (no intrinsics, depth or target enter).

    The estimate's ``tracked`` is :func:`coherent_share`; ``residual`` is zero, because the pose path predicts no error
    of its own. Diagnostics: ``metric_scale`` (the network's guess of the scene scale, already in the poses) and
    ``reference_offset_m`` (where it put view 0 before re-basing). A video with a non-finite pixel yields NaN poses,
    which the reward counts as an infrastructure failure.

    Args:
        network: a loaded pose network, or another backend of the same call.
        frame_stride: evaluate frames 0, s, 2s, ... and the last. 1 evaluates all frames, as in the paper.
        scenes_per_forward: videos per network call; bounds the activation memory.
        graphs: replay CUDA graphs on CUDA devices.
        memory: what it shares with other scorers; None: a graph pool of its own, and weights that stay.
        frames: where the inputs of all scorers of a run are made; None makes those of this one alone.
    """

    name = "mapanything"

    def __init__(
        self,
        network: PoseBackend,
        *,
        device: torch.device | str = "cpu",
        frame_stride: int = 1,
        scenes_per_forward: int = 1,
        graphs: bool = True,
        memory: ScorerMemory | None = None,
        frames: SharedFrames | None = None,
    ) -> None:
        if scenes_per_forward < 1:
            raise UsageError(f"scenes_per_forward must be at least 1, got {scenes_per_forward}")
        self.network, self.device = network, torch.device(device)
        self.frame_stride, self.scenes_per_forward, self.graphs = frame_stride, scenes_per_forward, graphs
        self._view = (frames or SharedFrames()).geometry(lambda count: frame_subset(count, self.frame_stride))
        self._memory = memory or ScorerMemory()
        self._before = self._memory.enter(network) if isinstance(network, nn.Module) else None
        self._size: tuple[int, int] | None = None
        self._run: Body

    @torch.no_grad()
    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Poses of ``video`` ``[B, F, 3, H, W]`` in [-1, 1], on its device; ``source`` is not read."""
        shown = self._view(video)
        if self._before is not None:
            self._before()
        run = self._runner(shown.size)
        parts = [run(chunk.to(self.device)) for chunk in shown.inputs.split(self.scenes_per_forward)]
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        out = {name: value.to(video.device) for name, value in out.items()}
        c2w = torch.where(shown.finite[:, None, None, None], out.pop("c2w"), torch.nan)
        return PoseEstimate(
            c2w=c2w,
            frame_indices=torch.tensor(shown.frames, device=video.device),
            tracked=out.pop("tracked"),
            residual=torch.zeros(len(c2w), device=video.device),
            diagnostics=out,
        )

    def _runner(self, size: tuple[int, int]) -> Body:
        """The body for images of this size; a new size replaces the old one and its graphs."""
        if self._size != size:
            if isinstance(self.network, PoseNetwork):
                self.network.set_size(*size)
            body = PoseBody(self.network).to(self.device)
            exact = exactly(body)
            self._run = GraphedScorer(exact, body, self._memory.capture) if self.graphs else exact
            self._size = size
        return self._run


def build_evaluator(
    checkpoint: str,
    *,
    layout: Literal["v1.1", "v1"] = "v1.1",
    backend: Literal["native", "published"] = "native",
    device: str = "auto",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    frame_stride: int = 1,
    scenes_per_forward: int = 1,
    graphs: bool = True,
    frames: SharedFrames | None = None,
    memory: ScorerMemory | None = None,
) -> MapAnythingEvaluator:
    """Build the evaluator from configuration values.

    Args:
        checkpoint: ``model.safetensors`` or its folder; for the published backend a folder or a hub id.
        layout: which release the checkpoint is.
        backend: "native" (this package) or "published" (the ``mapanything`` package; for comparison, never captured).
        device: "auto" takes CUDA where there is one.
        dtype: storage dtype of the large matrices.
        frames, memory: given by the registry.

    Raises:
        RewardError: the weights or the published package are missing (the message holds the command to get them).
        CheckpointError: the weights are of another layout.
    """
    if dtype not in DTYPES or backend not in ("native", "published"):
        raise UsageError(
            f"dtype must be one of {', '.join(DTYPES)} and backend native or published; got {dtype}, {backend}"
        )
    place = named_device(device)
    if backend == "published":
        from geoalign.evaluators.mapanything.published import PublishedBackend

        network: PoseBackend = PublishedBackend.from_pretrained(checkpoint, device=place, dtype=DTYPES[dtype])
        graphs = False
    else:
        network = load_pose_network(Path(checkpoint), layout, device=place, matrix_dtype=DTYPES[dtype])
    return MapAnythingEvaluator(
        network,
        device=place,
        frame_stride=frame_stride,
        scenes_per_forward=scenes_per_forward,
        graphs=graphs,
        frames=frames,
        memory=memory,
    )
