"""Retake one video with a trained model: from files to files, on one device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig
from geoalign.config.model import ModelConfig
from geoalign.data.frames import cover_crop_intrinsics, to_float
from geoalign.data.readers import AnyReader
from geoalign.data.video import PyAVReader, probe_clip, warn_once
from geoalign.errors import RewardError, RunError, UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.flow.policy import Velocity
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.geometry.io import load_trajectory
from geoalign.geometry.presets import preset, preset_name
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory
from geoalign.models.codec_base import LatentCodec
from geoalign.models.conditioning import Conditioning
from geoalign.perf.cost import TransformerCost
from geoalign.policy.policy import Prepared, RetakePolicy
from geoalign.types import SourceClip

WAN_SIZE, MAX_FRAMES = (480, 832), 81


@dataclass(frozen=True, slots=True, eq=False)
class RetakeInputs:
    """A decoded source video with both camera paths, batch of one.

    Attributes:
        video: ``[1, F, 3, H, W]`` float32 in [-1, 1].
        source_camera: ``[1, F]``.
        target_camera: ``[1, F]``, frame 0 is the identity.
        ground_plane: ``[1, 4]`` or None.
        fps: frames per second of the source.
    """

    video: Tensor
    source_camera: CameraTrajectory
    target_camera: CameraTrajectory
    ground_plane: Tensor | None
    fps: float


def read_inputs(
    video: Path,
    trajectory: str,
    *,
    codec: LatentCodec,
    speed: float = 1.0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    source_camera: Path | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
    ground_plane: tuple[float, float, float, float] | None = None,
) -> RetakeInputs:
    """Decode and crop the source and lay out both camera paths.

    Args:
        video: a video file or a folder of frames.
        trajectory: a preset name, or a camera file: its first poses, or all of them spread over a longer video.
        codec: decides which lengths and sizes are possible.
        speed: multiplies the camera's motion per frame.
        frames: length; default: the longest that fits the codec, at most 81.
        size: (H, W) to scale to cover and centre-crop to; default 480 x 832 for the Wan VAE, else the video's own.
        source_camera: camera file of the source; None: its camera does not move.
        intrinsics: of the original frames, as fractions of (W, H, W, H); default: the camera file's, else 60 degrees.
        ground_plane: for models with geometric camera phases.

    Raises:
        UserError: anything that cannot be read or does not fit; nothing has been written.
    """
    _check_numbers(speed, intrinsics)
    plane = None if ground_plane is None else _unit_plane(ground_plane)
    reader = AnyReader(PyAVReader())
    info = probe_clip(reader, video)
    warn_once(video, info.remarks)
    count = choose_frames(codec, info.frames) if frames is None else frames
    if count > info.frames:
        raise UsageError(f"{video} has {info.frames} frames, --frames {count} asks for more")
    size = size or (WAN_SIZE if codec.name == "wan_vae" else (info.height, info.width))
    codec.latent_shape(count, *size)
    source = _source_camera(source_camera, count, (info.height, info.width), intrinsics)
    lens = cover_crop_intrinsics(source.intrinsics, info.height, info.width, size)
    source = source.with_intrinsics(lens)
    target = _target_camera(trajectory, count, speed, lens[0])
    pixels = to_float(reader.read(video, range(count), size))
    fps = info.fps if info.fps > 0 else 24.0
    return RetakeInputs(pixels[None], _batch(source), _batch(target), plane, fps)


def choose_frames(codec: LatentCodec, available: int) -> int:
    """The largest length up to 81 that the codec takes; 81 gives 81 and 70 gives 69 if it must be 4k + 1."""
    for count in range(min(available, MAX_FRAMES), 0, -1):
        try:
            codec.check_frames(count)
        except UsageError:
            continue
        return count
    raise UsageError(f"no length up to {available} fits the frame rule {codec.frame_rule}")


def with_estimated_camera(inputs: RetakeInputs, evaluator: PoseEvaluator) -> tuple[RetakeInputs, float]:
    """Replace the source camera by the poses that ``evaluator`` reads from the source video, keeping the lens.

    Returns:
        the inputs, and the share of the picture that the estimate explains.

    Raises:
        RewardError: poses that are not finite, or not one per frame.
        UserError: whatever the evaluator itself misses.
    """
    source = SourceClip(inputs.video, inputs.source_camera, inputs.ground_plane, ("source",))
    found = evaluator(inputs.video, source)
    frames = inputs.video.shape[1]
    if len(found.frame_indices) != frames or not torch.isfinite(found.c2w).all():
        raise RewardError(
            f"{evaluator.name} found no pose for some of the {frames} source frames; give --source-camera instead"
        )
    camera = CameraTrajectory.build(found.c2w.to(inputs.source_camera.c2w), inputs.source_camera.intrinsics)
    return replace(inputs, source_camera=camera.relative_to_first()), float(found.tracked[0])


def build_condition(
    policy: RetakePolicy,
    inputs: RetakeInputs,
    text: tuple[Tensor, Tensor] | None = None,
    image_tokens: Tensor | None = None,
) -> Conditioning:
    """Encode the source and gather everything the network is conditioned on.

    Args:
        policy: model, codec and guidance.
        inputs: video and cameras on the policy's device.
        text: embeddings ``[1, L, D]`` of the prompt and of the negative prompt (read with guidance only).
        image_tokens: ``[1, N, D]``.

    Raises:
        UsageError: the model needs a ground plane or image tokens that are not given.
    """
    config = policy.model.config
    if config.camera == "geometric" and inputs.ground_plane is None:
        raise UsageError("this model needs the ground plane of the scene: give --ground-plane nx,ny,nz,d (metres)")
    if config.image_dim is not None and image_tokens is None:
        raise UsageError(
            "this model needs an image encoder; put image_encoder/ or the open-clip .pth beside its weights"
        )
    return Conditioning(
        source_latents=policy.codec.encode(inputs.video),
        source_camera=inputs.source_camera,
        target_camera=inputs.target_camera,
        ground_plane=inputs.ground_plane,
        context=None if text is None else text[0],
        image_tokens=image_tokens,
        negative=None if text is None or policy.guidance == 1.0 else text[1],
    )


@torch.no_grad()
def retake(
    policy: RetakePolicy,
    inputs: RetakeInputs,
    cond: Conditioning,
    flow: FlowConfig,
    *,
    seed: int = 0,
    on_pass: Callable[[int], object] = lambda passes: None,
) -> Tensor:
    """Sample deterministically and decode: ``[1, F, 3, H, W]`` in [-1, 1].

    ``on_pass`` is told how many passes of the network each step took (two under guidance).

    Raises:
        RunError: the model or its codec gave NaN or infinity.
    """

    def velocity(x: Tensor, timestep: Tensor, rows: Prepared) -> Velocity:
        answer = policy.velocity(x, timestep, rows)
        on_pass(answer.passes)
        return answer

    assert cond.source_latents is not None
    frames = cond.source_latents.shape[2] - int(policy.model.config.first_frame_given)
    shape = (cond.source_latents.shape[1], frames, *cond.source_latents.shape[3:])
    noise = initial_noise(shape, seed, 0, torch.zeros(1, dtype=torch.int64, device=policy.device))
    latents = FlowSampler(build_step_table(flow)).sample(velocity, policy.prepare(cond), noise)
    _refuse_non_finite(latents, "the model")
    video = policy.decode(latents, inputs.video)
    _refuse_non_finite(video, "the autoencoder")
    return video


def _refuse_non_finite(values: Tensor, maker: str) -> None:
    if not torch.isfinite(values).all():
        share = float((~torch.isfinite(values)).float().mean())
        raise RunError(
            f"{maker} gave NaN or infinity in {share:.0%} of its values, nothing is written; are its weights intact, "
            "and the cameras, --guidance and --shift of a usual size?"
        )


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
    # Parameters, plus at the widest point the float32 residual stream, q, k, v and the hidden feed-forward activations.
    memory = parameters * size + work.tokens * (2 * 4 * config.dim + size * (4 * config.dim + 2 * config.ffn_dim))
    latent = codec.latent_shape(frames, height, width)
    return CostEstimate(latent, work.tokens, forwards, flop / 1e12, memory / 1e9, flop / _throughput(dtype, device))


def _throughput(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a matrix product, measured in a fraction of a second."""
    size = 4096 if device.startswith("cuda") else 384
    a = torch.ones(size, size, dtype=dtype, device=device)
    a @ a
    start = time.perf_counter()
    total = sum(((a @ a)[0, 0] for _ in range(4)), start=a[0, 0])
    float(total)  # waits for the device
    return 4 * 2 * size**3 / (time.perf_counter() - start)


def _source_camera(
    path: Path | None, count: int, image_size: tuple[int, int], intrinsics: tuple[float, ...] | None
) -> CameraTrajectory:
    if path is None:
        return CameraTrajectory.identity(count, intrinsics or DEFAULT_INTRINSICS)
    camera = load_trajectory(path, intrinsics=intrinsics, image_size=image_size)
    if camera.num_frames < count:
        raise UsageError(
            f"{path} has {camera.num_frames} poses, the video needs {count}; use --frames {camera.num_frames}"
        )
    return camera.frames(slice(0, count)).relative_to_first()


def _target_camera(trajectory: str, count: int, speed: float, lens: Tensor) -> CameraTrajectory:
    path = Path(trajectory)
    if not path.suffix and not path.exists():
        return preset(preset_name(trajectory), count, speed=speed, intrinsics=lens)
    camera = load_trajectory(path, intrinsics=lens)
    camera = camera.frames(slice(0, count)) if camera.num_frames >= count else camera.resample(count)
    if speed == 1.0:
        return camera
    rotvec, step = camera.increments()
    return CameraTrajectory.from_increments(speed * rotvec, speed * step, camera.intrinsics)


def _check_numbers(speed: float, intrinsics: Sequence[float] | None) -> None:
    if not 0 < speed < math.inf:
        raise UsageError(f"--speed must be positive and finite, got {speed}")
    if intrinsics is not None and not (all(map(math.isfinite, intrinsics)) and min(intrinsics[:2]) > 0):
        given = ",".join(f"{value:g}" for value in intrinsics)
        raise UsageError(f"--intrinsics {given}: needs four finite numbers, the focal lengths fx and fy above 0")


def _unit_plane(plane: tuple[float, float, float, float]) -> Tensor:
    value = torch.tensor([plane])
    length = value[:, :3].norm()
    if not (torch.isfinite(value).all() and length > 0 and plane[3] > 0):
        raise UsageError(f"--ground-plane {plane}: needs a direction and a positive distance in metres")
    return torch.cat([value[:, :3] / length, value[:, 3:] / length], 1)


def _batch(camera: CameraTrajectory) -> CameraTrajectory:
    return CameraTrajectory.stack([camera])
