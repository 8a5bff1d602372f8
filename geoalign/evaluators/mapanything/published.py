"""The published ``mapanything`` package as a second backend, for comparison with the native network."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from geoalign.errors import RewardError
from geoalign.evaluators.mapanything.network import RawPoses

INSTALL = 'pip install "mapanything @ git+https://github.com/facebookresearch/map-anything"'


class PublishedBackend:
    """Calls the published model's inference entry point and keeps its poses.

    Args:
        model: an object with the published ``infer(views, ...)``; see :meth:`from_pretrained`.
        dtype: bfloat16 runs the published autocast, float32 runs without it.
    """

    patch = 14

    def __init__(self, model: Any, *, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.dtype = model, dtype

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, device: torch.device, dtype: torch.dtype) -> PublishedBackend:
        """Load ``checkpoint`` (folder or hub id) with the published package.

        Raises RewardError with the install command when the package is missing.
        """
        try:
            models = importlib.import_module("mapanything.models")
        except ImportError as error:
            raise RewardError(
                f"the published backend needs the mapanything package ({error}); run: {INSTALL} "
                "or set backend: native, which needs no package"
            ) from error
        with _encoder_code_from_package():
            model = models.MapAnything.from_pretrained(checkpoint)
        return cls(model.to(device).eval(), dtype=dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> RawPoses:
        """Poses of ``[B, V, 3, H, W]`` normalised images, in the same units and order as the native network."""
        views = [{"img": images[:, view], "data_norm_type": ["dinov2"]} for view in range(images.shape[1])]
        predictions = self.model.infer(
            views,
            memory_efficient_inference=False,
            use_amp=self.dtype != torch.float32,
            amp_dtype="bf16",
            apply_mask=False,
            mask_edges=False,
        )
        return RawPoses(
            torch.stack([p["cam_trans"] for p in predictions], dim=1).float(),
            torch.stack([p["cam_quats"] for p in predictions], dim=1).float(),
            predictions[0]["metric_scaling_factor"].reshape(-1, 1).float(),
        )


@contextlib.contextmanager
def _encoder_code_from_package() -> Iterator[None]:
    """Serve the encoder's ``torch.hub`` request from the copy of DINOv2 inside the package, without pretrained weights.

    The published constructor always asks torch.hub for the encoder's code, which would need a network; its weights are
    overwritten by the checkpoint anyway. Other hub requests pass through.
    """
    try:
        backbones = importlib.import_module("mapanything.models.external.dinov2.hub.backbones")
    except ImportError:
        yield  # a release without the copy: leave torch.hub as it is
        return
    original = torch.hub.load

    def load(repository: str, entry: str, *arguments: Any, **options: Any) -> Any:
        builder = getattr(backbones, entry, None)
        if "dinov2" not in str(repository) or builder is None:
            return original(repository, entry, *arguments, **options)
        options.pop("force_reload", None)
        return builder(**{**options, "pretrained": False})

    torch.hub.load = load
    try:
        yield
    finally:
        torch.hub.load = original
