"""Depth Anything 3 (Lin et al., arXiv 2511.10647) as a pose evaluator, through its published package.

An independent metric estimator beside MapAnything. Only the nested checkpoint (giant network scaled by a metric depth
network, CC-BY-NC 4.0) states poses in metres; the others have no scale and are refused. Nothing is aligned: neither to
the target nor to known depth. The package pins old versions of its dependencies, so give it a worker process with a
Python environment of its own (``placement: worker``, ``python``).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geoalign.config.published import DEPTH_ANYTHING
from geoalign.errors import CheckpointError, RewardError, UsageError
from geoalign.evaluators.base import PoseEstimate
from geoalign.evaluators.mapanything.evaluator import coherent_share, frame_subset
from geoalign.files.need import Need
from geoalign.files.parsing import read_json_object
from geoalign.files.weights import TensorFile
from geoalign.frozen.device import named_device
from geoalign.frozen.qwen_patches import to_uint8
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.layouts import summary
from geoalign.types import SourceClip

# The package asks for numpy < 2 and a viewer's worth of others; these are what its inference imports.
INSTALL = (
    "pip install --no-deps depth-anything-3==0.1.1 && pip install addict einops evo huggingface_hub imageio "
    "moviepy==1.0.3 omegaconf opencv-python-headless plyfile pycolmap torchvision trimesh"
)
DOWNLOAD = DEPTH_ANYTHING.line()
# What the nested model raises when a video shows (almost) nothing but sky: there is no depth to scale by.
_NO_DEPTH = "non-sky"


class DepthAnything3Evaluator:
    """PoseEvaluator by the published inference call, one video at a time.

    ``tracked`` is :func:`coherent_share`, and 0 for a video without a pixel of depth; ``residual`` is zero. The
    diagnostic ``metric_scale`` is the factor that brought the poses to metres. A video with a non-finite pixel yields
    NaN poses.

    Args:
        model: an object with the published ``inference(image, ...)``; see :func:`build_evaluator`.
        device: where the model lies.
        frame_stride: evaluate frames 0, s, 2s, ... and the last. 1 evaluates all frames, as in the paper.
        longest_side: frames are resized to this longest side, in pixels (a multiple of 14).
    """

    name = "depth_anything_3"

    def __init__(
        self, model: Any, *, device: torch.device | str = "cpu", frame_stride: int = 1, longest_side: int = 504
    ) -> None:
        if longest_side < 14 or longest_side % 14:
            raise UsageError(f"longest_side must be a positive multiple of 14, got {longest_side}")
        self.model, self.device = model, torch.device(device)
        self.frame_stride, self.longest_side = frame_stride, longest_side

    @torch.no_grad()
    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        """Poses of ``video`` ``[B, F, 3, H, W]`` in [-1, 1], on its device; ``source`` is not read.

        Raises UsageError for a checkpoint whose poses are not in metres.
        """
        indices = torch.tensor(frame_subset(video.shape[1], self.frame_stride), device=video.device)
        frames = video.index_select(1, indices)
        finite = torch.isfinite(frames).flatten(1).all(dim=1)
        pixels = to_uint8(torch.nan_to_num(frames))
        answers = [self._poses(clip) for clip in pixels.permute(0, 1, 3, 4, 2).cpu()]
        c2w = CameraTrajectory.build(torch.stack([poses for poses, _ in answers])).relative_to_first().c2w
        scale = torch.tensor([scale for _, scale in answers], device=video.device)
        return PoseEstimate(
            c2w=torch.where(finite[:, None, None, None], c2w.to(video.device), torch.nan),
            frame_indices=indices,
            tracked=torch.where(scale > 0, coherent_share(self._seen(pixels)), 0.0),
            residual=torch.zeros_like(scale),
            diagnostics={"metric_scale": scale},
        )

    def _seen(self, pixels: Tensor) -> Tensor:
        """Levels about as large as the network sees them: the coherent share needs some hundred cells."""
        factor = self.longest_side / max(pixels.shape[-2:])
        flat = F.interpolate(pixels.flatten(0, 1).float(), scale_factor=factor, mode="bilinear", antialias=True)
        return flat.unflatten(0, pixels.shape[:2])

    @torch.no_grad()
    def depth(self, video: Tensor) -> Tensor | None:
        """Depth ``[F, h, w]`` float32 in metres along the optical axis of a video ``[F, 3, H, W]`` in [-1, 1].

        h and w are those that the network sees; the sky is as far as what is farthest. None for a video without a pixel
        of depth. Raises UsageError as :meth:`__call__`.
        """
        found = self._infer(to_uint8(torch.nan_to_num(video)).permute(0, 2, 3, 1).cpu())
        return None if found is None else torch.as_tensor(found.depth).float()

    def _poses(self, clip: Tensor) -> tuple[Tensor, float]:
        """Camera-to-world ``[V, 4, 4]`` of uint8 ``[V, H, W, 3]``, and the metric scale (0: no depth at all)."""
        found = self._infer(clip)
        if found is None:
            return torch.eye(4).expand(len(clip), 4, 4), 0.0
        w2c = torch.eye(4).repeat(len(clip), 1, 1)
        w2c[:, :3] = torch.as_tensor(found.extrinsics).float()[:, :3]
        return torch.linalg.inv(w2c), float(found.scale_factor)

    def _infer(self, clip: Tensor) -> Any:
        """The published prediction of uint8 ``[V, H, W, 3]``, in metres; None where there is no depth at all."""
        # The metric branch samples pixels at random: seeded here, and nobody else's draws are touched.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            try:
                found = self.model.inference(
                    [frame.numpy() for frame in clip], ref_view_strategy="first", process_res=self.longest_side
                )
            except AssertionError as error:
                if _NO_DEPTH not in str(error):
                    raise
                return None
        if not found.is_metric:
            raise UsageError(
                "this Depth Anything 3 checkpoint has no metric scale, so its poses are not in metres; use the nested "
                f"one: {DOWNLOAD}"
            )
        return found


def needs(checkpoint: str, **_: Any) -> tuple[Need, ...]:
    """What the evaluator with these options reads."""
    path = Path(checkpoint).expanduser()
    return (Need("Depth Anything 3 weights", path, DEPTH_ANYTHING.line(path), _verified),)


def _verified(folder: Path) -> str:
    read_json_object(folder / "config.json", CheckpointError)
    return summary(TensorFile(folder).shapes)


def build_evaluator(
    checkpoint: str, *, device: str = "auto", frame_stride: int = 1, longest_side: int = 504
) -> DepthAnything3Evaluator:
    """Build the evaluator from configuration values.

    Args:
        checkpoint: folder with the nested model's ``config.json`` and ``model.safetensors``. Nothing is downloaded.
        device: "auto" takes CUDA where there is one.

    Raises RewardError with the command to get it when the package or the checkpoint is missing.
    """
    place = named_device(device)
    try:
        api = importlib.import_module("depth_anything_3.api")
    except ImportError as error:
        raise RewardError(
            f"the depth_anything_3 evaluator needs the depth-anything-3 package ({error}); run, best in an environment "
            f"of its own (placement: worker): {INSTALL}"
        ) from error
    try:
        model = api.DepthAnything3.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RewardError(
            f"no Depth Anything 3 checkpoint at {checkpoint} ({error}). On a machine with a network run: {DOWNLOAD}"
        ) from error
    model = model.to(place).eval()
    return DepthAnything3Evaluator(model, device=place, frame_stride=frame_stride, longest_side=longest_side)
