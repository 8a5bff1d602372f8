"""What a retake of one video starts from: the decoded source with both cameras, and what the work will cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.model import ModelConfig
from geoalign.data.frames import to_float
from geoalign.data.readers import AnyReader, shown_size
from geoalign.data.video import PyAVReader, probe_clip, warn_once
from geoalign.errors import RewardError, UsageError, argument
from geoalign.evaluators.base import PoseEvaluator
from geoalign.geometry.cameras.door import camera_beside, fit_target, open_camera, open_target
from geoalign.geometry.lens import cover_crop_intrinsics, lens_fault
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, LARGEST, CameraTrajectory
from geoalign.jobs import arguments
from geoalign.models.codec_base import LatentCodec
from geoalign.perf.cost import TransformerCost
from geoalign.types import RetakeBatch, SourceClip

WAN_SIZE, MAX_FRAMES = (480, 832), 81


def read_inputs(
    video: Path,
    trajectory: str | Path | CameraTrajectory,
    *,
    codec: LatentCodec,
    speed: float = 1.0,
    frames: int | Literal["all"] | None = None,
    size: tuple[int, int] | None = None,
    source_camera: str | Path | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
    ground_plane: tuple[float, float, float, float] | None = None,
) -> tuple[RetakeBatch, float]:
    """Decode and crop the source and lay out both camera paths.

    Args:
        video: a video file or a folder of frames.
        trajectory: a preset, a camera file or a path: its first poses, or all of them spread over a longer video.
        codec: decides which lengths and sizes are possible.
        speed: multiplies the camera's motion per frame.
        frames: length; "all": the longest of the video that fits the codec; default: that, but at most 81.
        size: (H, W) to scale to cover and centre-crop to; default 480 x 832 for the Wan VAE, else the video's own.
        source_camera: camera of the source, a file or a preset (:func:`find_source_camera` looks for one); None: its
            camera does not move.
        intrinsics: of the original frames, as fractions of (W, H, W, H); default: the camera file's, else 60 degrees.
        ground_plane: for models with geometric camera phases; default: the camera file's.

    Returns:
        a batch of one without a prompt, on the CPU, and the frames per second of the source.

    Raises:
        UserError: anything that cannot be read or does not fit; nothing has been written.
    """
    speed = arguments.positive("speed", speed)
    if frames is not None and not (isinstance(frames, str) and frames == "all"):
        frames = arguments.whole("frames", frames, 1)
    size = None if size is None else arguments.frame_size("size", size)
    typed = None if ground_plane is None else _given_plane(ground_plane)
    if intrinsics is not None:
        intrinsics = _given_lens(intrinsics)
    if isinstance(trajectory, CameraTrajectory):
        trajectory = _given_path(trajectory)
    info = probe_clip(AnyReader(PyAVReader()), video)
    most = info.frames if frames == "all" else min(info.frames, MAX_FRAMES)
    count = frames if isinstance(frames, int) else choose_frames(codec, most)
    if count > info.frames:
        raise UsageError(f"{video} has {info.frames} frames, {argument('frames', count)} asks for more")
    size = size or (WAN_SIZE if codec.name == "wan_vae" else (info.height, info.width))
    codec.latent_shape(count, *size)
    clip, fps = read_source(video, count, size, source_camera=source_camera, intrinsics=intrinsics)
    clip = clip if typed is None else replace(clip, ground_plane=typed)
    lens = clip.camera.intrinsics[0, 0]
    if isinstance(trajectory, CameraTrajectory):
        target = fit_target(trajectory.with_intrinsics(lens), count, speed)
    else:
        target = open_target(trajectory, count, speed=speed, intrinsics=lens)
    return RetakeBatch(clip, _batch(target), ("",)), fps


def read_source(
    video: Path,
    frames: int,
    size: tuple[int, int],
    *,
    source_camera: str | Path | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
) -> tuple[SourceClip, float]:
    """Decode and crop the first ``frames`` frames of a source to ``size``, with its camera; arguments and errors are
    those of :func:`read_inputs`.

    Returns:
        a batch of one on the CPU, and the frames per second.
    """
    reader = AnyReader(PyAVReader())
    info = probe_clip(reader, video)
    warn_once(video, info.remarks)
    camera, plane = _source_camera(source_camera, frames, (info.height, info.width), intrinsics)
    camera = camera.with_intrinsics(cover_crop_intrinsics(camera.intrinsics, info.height, info.width, size))
    pixels = to_float(reader.read(video, range(frames), size))
    return SourceClip(pixels[None], _batch(camera), plane, ("source",)), info.fps if info.fps > 0 else 24.0


def sampler(steps: int, shift: float) -> FlowConfig:
    """The deterministic sampler of a retake; raises UsageError for settings that it cannot have."""
    try:
        return FlowConfig(steps=steps, shift=shift)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"]))
        given = argument(name, found["input"]) if name else f"{argument('steps', steps)}, {argument('shift', shift)}"
        raise UsageError(f"{given}: {found['msg'][:1].lower()}{found['msg'][1:]}") from None


def choose_frames(codec: LatentCodec, available: int) -> int:
    """The largest length up to ``available`` that the codec takes; 70 gives 69 if it must be 4k + 1."""
    for count in range(available, 0, -1):
        try:
            codec.check_frames(count)
        except UsageError:
            continue
        return count
    raise UsageError(f"no length up to {available} fits the frame rule {codec.frame_rule}")


def find_source_camera(
    video: Path, *, poses: bool = True, lens: bool = True, plane: bool = True
) -> tuple[str | None, str]:
    """The camera file beside a video, if its lengths are metres, and what to tell the user of it ("" if there is none).

    Args:
        video: a video file or a folder of frames.
        poses, lens, plane: whether that is taken from the file, and does not come from elsewhere.

    Raises:
        DataError: the file is damaged or no camera file.
    """
    found = camera_beside(video, shown_size)
    if found is None:
        return None, ""
    if not found.metric:
        return (
            None,
            f"{found.name} is not used, as it does not say that it is in metres; {argument('source_camera')} uses it",
        )
    has = {"poses": poses, "lens": lens and found.has_lens, "ground plane": plane and found.ground_plane is not None}
    if not any(has.values()):
        return None, ""
    parts = ", ".join(part for part, is_taken in has.items() if is_taken)
    return found.name, f"{parts} from {found.name}, found beside the video"


def with_estimated_camera(batch: RetakeBatch, evaluator: PoseEvaluator) -> tuple[RetakeBatch, float]:
    """Replace the source camera by the poses that ``evaluator`` reads from the source video, keeping the lens.

    Returns:
        the batch, and the share of the picture that the estimate explains.

    Raises:
        RewardError: poses that are not finite, or not one per frame.
        UserError: whatever the evaluator itself misses.
    """
    source = batch.source
    found = evaluator(source.video, source)
    frames = source.video.shape[1]
    if len(found.frame_indices) != frames or not torch.isfinite(found.c2w).all():
        raise RewardError(
            f"{evaluator.name} found no pose for some of the {frames} source frames; give {argument('source_camera')} "
            "instead"
        )
    camera = CameraTrajectory.build(found.c2w.to(source.camera.c2w), source.camera.intrinsics)
    return replace(batch, source=replace(source, camera=camera.relative_to_first())), float(found.tracked[0])


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What one retake will take; seconds are predicted from a short matrix product on the same device."""

    latent_shape: tuple[int, int, int, int]
    tokens: int
    forwards: int
    tflop: float
    memory_gb: float
    seconds: float


def estimate(
    config: ModelConfig,
    parameters: int,
    codec: LatentCodec,
    video_shape: Sequence[int],
    forwards: int,
    dtype: torch.dtype,
    device: str,
) -> CostEstimate:
    """Predict tokens, arithmetic, memory and time of denoising one video ``[1, F, 3, H, W]``."""
    _, frames, _, height, width = video_shape
    work = TransformerCost.of(config, frames, height, width)
    # The adapter runs once: its output is kept with the condition.
    flop = forwards * (work.forward_flops() - work.adapter_flops()) + work.adapter_flops()
    size = torch.empty(0, dtype=dtype).element_size()
    # Parameters, plus at the widest point the float32 residual stream, q, k, v and the hidden feed-forward activations;
    # and the source and the decoded video in float32, which long videos are made of.
    memory = parameters * size + work.tokens * (2 * 4 * config.dim + size * (4 * config.dim + 2 * config.ffn_dim))
    memory += 2 * 4 * math.prod(video_shape)
    latent = codec.latent_shape(frames, height, width)
    return CostEstimate(latent, work.tokens, forwards, flop / 1e12, memory / 1e9, flop / matmul_rate(dtype, device))


def device_memory_gb(device: torch.device | str) -> float:
    """All memory of a CUDA device, or of the host."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a matrix product, measured in a fraction of a second."""
    size = 4096 if device.startswith("cuda") else 384
    a = torch.ones(size, size, dtype=dtype, device=device)
    a @ a
    start = time.perf_counter()
    total = sum(((a @ a)[0, 0] for _ in range(4)), start=a[0, 0])
    float(total)  # waits for the device
    return 4 * 2 * size**3 / (time.perf_counter() - start)


def _source_camera(
    name: str | Path | None, count: int, image_size: tuple[int, int], intrinsics: tuple[float, ...] | None
) -> tuple[CameraTrajectory, Tensor | None]:
    """Camera ``[F]`` and ground plane ``[1, 4]`` (None if the file has none) of the source, float32."""
    if name is None:
        return CameraTrajectory.identity(count, intrinsics or DEFAULT_INTRINSICS), None
    opened = open_camera(name, frames=count, image_size=image_size, intrinsics=intrinsics)
    camera, plane = opened.window(range(count))
    return camera.to(dtype=torch.float32), None if plane is None else _unit_plane(opened.name, plane.tolist())


def _given_lens(intrinsics: Sequence[float]) -> tuple[float, float, float, float]:
    lens = arguments.four_numbers("intrinsics", intrinsics)
    told = argument("intrinsics", ",".join(f"{value:g}" for value in lens), f"intrinsics={lens}")
    if min(lens[:2]) <= 0:
        raise UsageError(f"{told}: the focal lengths fx and fy must be above 0")
    if (fault := lens_fault(torch.tensor(lens, dtype=torch.float64))) is not None:
        raise UsageError(f"{told}: {fault} of the frames; give fractions of (W, H, W, H), not pixels")
    return lens


def _given_plane(plane: Sequence[float]) -> Tensor:
    return _unit_plane(argument("ground_plane"), arguments.four_numbers("ground_plane", plane))


def _given_path(path: CameraTrajectory) -> CameraTrajectory:
    if path.batch_shape:
        raise UsageError(f"the path: poses of shape {list(path.c2w.shape)}; one path [F, 4, 4] is needed")
    return CameraTrajectory.validated(path.c2w, path.intrinsics, name="the path")


def _unit_plane(name: str, plane: Sequence[float]) -> Tensor:
    value = torch.tensor([plane])
    length = value[:, :3].norm()
    if not (torch.isfinite(value).all() and 0 < length < math.inf and 0 < value[0, 3] / length < LARGEST):
        raise UsageError(f"{name}: ground plane {tuple(plane)} needs a direction and a positive distance in metres")
    return torch.cat([value[:, :3] / length, value[:, 3:] / length], 1)


def _batch(camera: CameraTrajectory) -> CameraTrajectory:
    return CameraTrajectory.stack([camera])
