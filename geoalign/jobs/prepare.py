"""What ``geoalign prepare`` computes of a window; built here because it joins models, evaluators and the world."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT, PrepareConfig
from geoalign.config.schema import Config
from geoalign.data.cache import CacheFolder, open_cache
from geoalign.data.prepare import data_settings
from geoalign.errors import ConfigError, DataError, RunError, UserError
from geoalign.evaluators.base import PoseEstimate, PoseEvaluator
from geoalign.files.digest import by_content, content_hash
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.progress import bar, say
from geoalign.models.codec import PatchCodec
from geoalign.models.codec_base import LatentCodec
from geoalign.models.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from geoalign.models.wan_vae import load_wan_codec
from geoalign.policy.locate import locate, vae_of
from geoalign.policy.open import open_codec, patch_codec
from geoalign.rewards.registry import build_evaluator, evaluator_options
from geoalign.training.processes.device import device_of
from geoalign.types import SourceClip
from geoalign.world.dataset import is_complete, write_world

if TYPE_CHECKING:
    from geoalign.models.captions import Captioner


@dataclass(frozen=True, slots=True)
class ModelEncoder:
    """Everything that is computed of a window before training; parts that are None are left out.

    Attributes:
        identity: hashes of all weights and settings below; part of the cache key.
        codec: the codec of the policy.
        focal: focal length over frame width of clips whose camera is estimated.
        device: where codec and encoders run; results are on the CPU.
        text, image, captioner, evaluator, negative_prompt: see :class:`geoalign.config.data.PrepareConfig`.
    """

    identity: Mapping[str, str]
    codec: LatentCodec
    focal: float = 0.9
    device: str = "cpu"
    text: TextEncoder | None = None
    image: ImageEncoder | None = None
    captioner: Captioner | None = None
    evaluator: PoseEvaluator | None = None
    negative_prompt: str | None = None

    @torch.no_grad()
    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        """Of ``[F, 3, H, W]``: ``latents`` ``[C, T, h, w]``, texts ``context`` and ``negative`` ``[L, D]``, and
        ``image_tokens`` ``[N, D]``."""
        moved = frames.to(self.device)
        tensors = {"latents": self.codec.encode(moved[None])[0]}
        if self.text is not None:
            tensors["context"] = self.text([prompt])[0]
            if self.negative_prompt is not None:
                tensors["negative"] = self.text([self.negative_prompt])[0]
        if self.image is not None:
            tensors["image_tokens"] = self.image(moved[:1])[0]
        return {name: value.cpu() for name, value in tensors.items()}

    def caption(self, frames: Tensor) -> str | None:
        """A sentence about ``[F, 3, H, W]``; None without a captioner."""
        return None if self.captioner is None else self.captioner.caption(frames)

    def estimate_camera(self, frames: Tensor) -> tuple[CameraTrajectory, Tensor | None] | None:
        """The evaluator's path of ``[F, 3, H, W]`` in metres, with the assumed focal length; None without evaluator.

        Raises:
            DataError: the evaluator has no finite answer.
        """
        if self.evaluator is None:
            return None
        height, width = frames.shape[-2:]
        lens = (self.focal, self.focal * width / height, 0.5, 0.5)
        static = CameraTrajectory.identity(len(frames), lens)
        estimate = self.evaluator(frames[None], SourceClip(frames[None], CameraTrajectory.stack([static]), None, ("",)))
        c2w = every_frame(estimate, len(frames))
        return CameraTrajectory.validated(c2w, static.intrinsics.double(), name=self.evaluator.name), None


def every_frame(estimate: PoseEstimate, count: int) -> Tensor:
    """Poses ``[count, 4, 4]`` float64 of the first video: slerp and linear positions between evaluated frames.

    Raises:
        DataError: a pose is not finite.
    """
    known = estimate.c2w[0].double().cpu()
    if not bool(torch.isfinite(known).all()):
        raise DataError("the pose evaluator found no camera path")
    at = estimate.frame_indices.cpu()
    frame = torch.arange(count)
    left = (torch.searchsorted(at, frame, right=True) - 1).clamp(0, len(at) - 2)
    fraction = (frame - at[left]).double() / (at[left + 1] - at[left])
    rotation, position = so3.project(known[:, :3, :3]), known[:, :3, 3]
    turned = so3.interpolate(rotation[left], rotation[left + 1], fraction)
    return so3.rigid(turned, torch.lerp(position[left], position[left + 1], fraction[:, None]))


def claim_device(config: Config) -> torch.device:
    """The device of this process, made the current one: whatever asks for CUDA without a number gets this GPU."""
    device = device_of(config.run)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def build_encoder(config: Config) -> ModelEncoder:
    """Load what ``data.prepare`` names and the codec of ``train.base``.

    Raises:
        ConfigError: neither a base policy nor a codec is configured, or an unknown evaluator.
        CheckpointError: files that are missing, damaged or of another model.
    """
    settings, device = config.data.prepare, str(device_of(config.run))
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    codec = _codec(config, device)
    text = image = captioner = evaluator = None
    if settings.text is not None:
        text = load_text_encoder(settings.text, settings.tokenizer or settings.text, dtype=dtype, device=device)
        text.length = settings.text_length
    if settings.image is not None:
        image = load_image_encoder(settings.image, dtype=dtype, device=device)
    if settings.captioner is not None:
        from geoalign.models.captions import load_captioner

        captioner = load_captioner(settings.captioner, dtype=dtype, device=device)
    if settings.evaluator is not None:
        options = {"device": device} if "device" in evaluator_options(settings.evaluator) else {}
        evaluator = build_evaluator(settings.evaluator, **options | settings.evaluator_options)
    place = "cpu" if isinstance(codec, PatchCodec) else device  # a patch transform is not worth the transfer
    identity, focal = encoder_identity(config), config.data.clips.default_focal
    negative = negative_text(settings)
    return ModelEncoder(identity, codec, focal, place, text, image, captioner, evaluator, negative)


def encoder_identity(config: Config) -> dict[str, str]:
    """What :func:`build_encoder` will be identified by, without loading any network; same errors."""
    settings = config.data.prepare
    identity = {"codec": _codec_hash(config)}
    if settings.text is not None:
        words = settings.tokenizer or settings.text
        identity["text"] = f"{content_hash(settings.text)} {content_hash(words)} {settings.text_length}"
        if settings.negative_prompt is not None:
            identity["negative"] = hashlib.sha256(str(negative_text(settings)).encode()).hexdigest()[:16]
    if settings.image is not None:
        identity["image"] = content_hash(settings.image)
    if settings.captioner is not None:
        identity["captioner"] = content_hash(settings.captioner)
    if settings.evaluator is not None:
        identity["evaluator"] = _evaluator_identity(settings)
    return identity


def open_prepared(config: Config) -> CacheFolder:
    """The cache that a run of these settings reads; where its encoders are missing, the only one of its data settings.

    Raises:
        DataError: none fits, or several do.
    """
    try:
        identity = encoder_identity(config)
    except UserError:
        identity = None
    return open_cache(config.data.cache, data_settings(config.data), identity)


def negative_text(settings: PrepareConfig) -> str | None:
    """The negative prompt in words, or None.

    Raises:
        ConfigError: a negative prompt without a text encoder.
    """
    if settings.negative_prompt is not None and settings.text is None:
        raise ConfigError("data.prepare.negative_prompt needs the text encoder data.prepare.text")
    return DEFAULT_NEGATIVE_PROMPT if settings.negative_prompt == "default" else settings.negative_prompt


def render_missing_data(config: Config, rank: int) -> None:
    """Render the embedded world into ``data.root`` if it is configured and missing: rank 0 renders, others wait.

    Raises:
        RunError: rank 0 has not finished after ``train.rank_timeout_s`` seconds.
    """
    if config.world is None or is_complete(config.data, config.world):
        return
    if rank == 0:
        say(f"rendering {config.world.clips} clips into {config.data.root}")
        with bar(config.world.clips, "rendering the world", "clip") as progress:
            write_world(config.data, config.world, progress.update)
        return
    timeout_s = config.train.rank_timeout_s
    deadline = time.monotonic() + timeout_s
    while not is_complete(config.data, config.world):  # its stamp is written last and atomically
        if time.monotonic() > deadline:
            raise RunError(
                f"{config.data.root}: rank 0 has not rendered the world in {timeout_s:g} s; see its messages"
            )
        time.sleep(0.2)


def _base(config: Config) -> Path:
    if config.train.base is None:
        raise ConfigError(
            "train.base is not set: prepare encodes with the codec of the base policy, or data.prepare.codec"
        )
    return locate(config.train.base).home


def _codec(config: Config, device: str) -> LatentCodec:
    path = config.data.prepare.codec
    return open_codec(_base(config), device=device) if path is None else load_wan_codec(path, device=device)


def _codec_hash(config: Config) -> str:
    """Of a policy file only the codec counts, so that a cache serves all policies that share it."""
    if config.data.prepare.codec is not None:
        return content_hash(config.data.prepare.codec)
    base = _base(config)
    codec = patch_codec(base)
    if codec is None:
        return content_hash(vae_of(base))
    settings = f"{codec.name} {codec.patch} {codec.luma} {codec.chroma} ".encode()
    return hashlib.sha256(settings + codec.channel_std.numpy().tobytes()).hexdigest()[:32]


def _evaluator_identity(settings: PrepareConfig) -> str:
    """Name and options; options that name existing files count by their content."""
    return f"{settings.evaluator} {json.dumps(by_content(settings.evaluator_options))}"
